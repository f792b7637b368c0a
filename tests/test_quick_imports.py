"""What a process imports to open a model, and what it does not."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from readapt_ray.quick_imports import quick_imports
from tests import factories

REPOSITORY = Path(__file__).parent.parent
NEVER_NEEDED = ("peft", "bitsandbytes", "deepspeed", "pandas", "sklearn", "ray", "faiss", "sentence_transformers")
COMPILER = ("torch._dynamo", "sympy")
"""transformers' model classes import it, 1.2 s of a core; what only lays texts end to end need not."""

OPENS_AND_SAVES = """
import gc, json, sys

def loaded(*names):
    return sorted(set(names) & sys.modules.keys())

from readapt_ray.catalog.models import open_model
from readapt_ray.retrieval.encoder import Encoder
from readapt_ray.quick_imports import import_for_models
from readapt_ray.storage import Location
from readapt_ray.training import dora, trainable

base, adapter, output, *never_needed = sys.argv[1:]
modules = loaded("transformers", *{compiler}, *never_needed)
import_for_models()
is_as_before = gc.isenabled() and gc.get_freeze_count() == 0
shape = Encoder.load(open_model(adapter)).encode(["tide"], "query").shape
opening = loaded(*never_needed)

from transformers import AutoModelForCausalLM

given = dora.AdapterShape(method="dora", rank=2, alpha=4.0, dropout=0.0, targets=("q_proj",))
model = AutoModelForCausalLM.from_pretrained(base)
dora.add_adapters(model, given)
dora.save_adapter(Location(output), dora.adapter_state(model), given, base=base, task_type="CAUSAL_LM")
saving = loaded(*never_needed)
import_for_models(freeze=True)
frozen = gc.get_freeze_count()
print(json.dumps([modules, is_as_before, shape, opening, saving, gc.isenabled(), frozen]))
"""


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_as_before_even_where_an_import_fails(was_on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if was_on else gc.disable)()
        with pytest.raises(ImportError, match="no such thing"), quick_imports():
            assert not gc.isenabled()
            raise ImportError("no such thing")
        assert gc.isenabled() == was_on
    finally:
        (gc.enable if before else gc.disable)()


def test_opening_a_model_and_saving_an_adapter_import_only_what_they_need(tmp_path: Path) -> None:
    """A decoder with its adapter; each of what is not needed would take a tenth of a second to two of a core."""
    base = factories.tiny_decoder(tmp_path / "base")
    factories.write_contract(factories.dora_adapter(tmp_path / "adapter", base))
    code = OPENS_AND_SAVES.replace("{compiler}", repr(COMPILER))
    command = [sys.executable, "-c", code, *map(str, (base, tmp_path / "adapter", tmp_path / "saved")), *NEVER_NEEDED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=600, check=True)
    modules, is_as_before, shape, opening, saving, is_on, num_frozen = json.loads(done.stdout.splitlines()[-1])
    assert (modules, opening, saving) == ([], [], [])
    assert is_as_before and is_on
    assert num_frozen > 100_000
    assert shape == [1, 32]
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["r"] == 2
