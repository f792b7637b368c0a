"""What plain PEFT and transformers make of the same folders, in float64 and under headless names."""

from pathlib import Path

import peft
import torch
import transformers

from tests import factories

NO_HEAD = {"llama": "AutoModelForCausalLM", "bert": "AutoModelForMaskedLM"}


def plain(folder: Path, *, headless: bool = False) -> torch.nn.Module:
    kind = transformers.AutoConfig.from_pretrained(folder).model_type
    loader = getattr(transformers, "AutoModel" if headless else NO_HEAD[kind])
    return loader.from_pretrained(folder).double()


def merged_by_peft(base: Path, adapter: Path, *, headless: bool = False) -> dict[str, torch.Tensor]:
    """PEFT's own merge_and_unload in float64."""
    model = peft.PeftModel.from_pretrained(plain(base, headless=headless), str(adapter), autocast_adapter_dtype=False)
    return factories.without_head(model.double().merge_and_unload().state_dict())


def as_float64(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each.double() for name, each in factories.without_head(factories.read_tensors(folder)).items()}
