import pytest

from readapt_ray import hardware


@pytest.mark.parametrize(
    ("capabilities", "has_units"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": True}, True),
        ({"avx512_f": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_bfloat16_units_are_amx_or_avx512_bf16(capabilities, has_units, monkeypatch):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capabilities)
    assert hardware.has_bfloat16_units() is has_units
