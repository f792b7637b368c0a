"""The loss of withheld passages against plain transformers and PEFT."""

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM

from readapt_ray.catalog.models import open_model
from readapt_ray.training.withheld_loss import losses
from tests import factories

TEXTS = ["array shape dtype axis", "shape of an array with axis " * 12, "x"]


def _losses(base, trained, objective="causal_lm"):
    options = {"objective": objective, "max_tokens": 24, "dtype": torch.float32, "device": torch.device("cpu")}
    return losses(open_model(str(base)), open_model(str(trained)), TEXTS, **options)


def _plain(model, tokenizer):
    found = []
    for text in TEXTS:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        row = torch.tensor([ids[:24]])
        with torch.no_grad():
            found.append(float(model(input_ids=row, labels=row).loss))
    return found


def test_losses_are_those_of_transformers_and_of_peft(tmp_path):
    base = factories.tiny_decoder(tmp_path / "base")
    adapter = factories.dora_adapter(tmp_path / "adapter", base)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = open_model(str(base)).tokenizer
    before = _plain(plain, tokenizer)
    after = _plain(peft.PeftModel.from_pretrained(plain, str(adapter)).eval(), tokenizer)
    np.testing.assert_allclose(_losses(base, adapter), [before, after], rtol=1e-4)
    assert not np.allclose(before, after, rtol=1e-2)


def test_all_weights_trained_are_loaded_whole(tmp_path):
    base, other = factories.tiny_decoder(tmp_path / "base"), factories.tiny_decoder(tmp_path / "other", seed=5)
    found = _losses(base, other)
    np.testing.assert_array_equal(found[1], _losses(other, other)[0])


def test_masked_tokens_are_the_same_before_and_after(tmp_path):
    base = factories.tiny_encoder(tmp_path / "base")
    adapter = factories.dora_adapter(tmp_path / "adapter", base)
    found = _losses(base, adapter, "masked_lm")
    np.testing.assert_array_equal(_losses(base, base, "masked_lm")[0], _losses(base, base, "masked_lm")[1])
    assert np.isfinite(found).all()
    assert not np.allclose(found[0], found[1])
