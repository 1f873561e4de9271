"""The conformance kit on backbones and masks: mistakes in them are caught by the check meant for them."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from torch import nn

from lattice import cli, register
from lattice.components.backbone.llama import Llama
from lattice.protocols import Mask
from lattice.testing import CHECKS, assert_conforms, check_component


@register("backbone", "test_costly")
@dataclass(frozen=True, kw_only=True)
class Costly(Llama):
    """It declares half of what its attention costs."""

    @property
    def layer_cost(self):
        cost = super().layer_cost
        return replace(cost, attention=cost.attention // 2)


class Smoothed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x) + 0.1 * x.mean(1, keepdim=True)


@register("backbone", "test_smoothed")
@dataclass(frozen=True, kw_only=True)
class SmoothedLlama(Llama):
    """Its last norm looks at all tokens."""

    def build(self):
        decoder = super().build()
        decoder.model.norm = Smoothed(decoder.model.norm)
        return decoder


@register("mask", "test_even")
@dataclass(frozen=True, kw_only=True)
class Even(Mask):
    """Every other place of a row is seen: with padding before it, another token."""

    needs_documents = False

    def sees(self, query, key):
        return (key.token % 2 == 0) | (key.token == query.token)


@register("mask", "test_documents_unseen")
@dataclass(frozen=True, kw_only=True)
class DocumentsUnseen(Mask):
    """It asks for documents and looks at none."""

    needs_documents = True

    def sees(self, query, key):
        return None


def broken(role, kind, checks=None):
    return {one.check for one in check_component(role, {"kind": kind}, checks=checks) if not one.held}


@pytest.mark.parametrize(
    "table",
    [
        {"kind": "causal", "window": 3, "thoughts": "own"},
        {"kind": "causal", "thoughts": "last"},
        {"kind": "document", "window": 2},
    ],
    ids=lambda table: "-".join(map(str, table.values())),
)
def test_masks_conform(table):
    assert_conforms(table, role="mask")


def test_a_backbone_conforms():
    assert_conforms({"kind": "gpt_neox", "use_parallel_residual": False}, role="backbone")


def test_mistakes_are_caught():
    assert broken("backbone", "test_costly") == {"cost"}
    assert "causality" in broken("backbone", "test_smoothed", ["shapes", "causality"])
    assert broken("mask", "test_even", ["shapes", "causality", "batch and padding"]) == {"batch and padding"}
    assert broken("mask", "test_documents_unseen") == {"documents"}


def test_what_cannot_be_checked():
    with pytest.raises(ValueError, match="role = 'loss': must be one of recurrence, backbone, mask"):
        check_component("loss", {"kind": "cross_entropy"})
    with pytest.raises(ValueError, match="recurrence = 'llama': must be one of none, latent_thoughts"):
        assert_conforms({"kind": "causal"}, role="mask", backbone="llama")
    with pytest.raises(ValueError, match="check = 'causality': must be one of documents"):
        check_component("mask", {"kind": "document"}, checks=["causality"])
    with pytest.raises(ValueError, match=r"backbone 'llama': shape\.num_layers is 3; the checks need 4"):
        check_component("backbone", {"kind": "llama", "num_hidden_layers": 3})


FILE = """
from dataclasses import dataclass

from lattice import register
from lattice.components.backbone.llama import Llama
from lattice.components.mask.document import Document


@register("backbone", "llama_of_mine")
@dataclass(frozen=True, kw_only=True)
class Mine(Llama):
    layers: int = 6

    @property
    def shape(self):
        from dataclasses import replace

        return replace(super().shape, num_layers=self.layers)


@register("mask", "mask_of_mine")
@dataclass(frozen=True, kw_only=True)
class Window(Document):
    pass
"""


def test_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("others.py").write_text(FILE)

    def run(*settings):
        code = 0
        try:
            cli.main(["check", "others.py", *settings])
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr()

    code, said = run()
    assert code == 2
    assert "backbone 'llama_of_mine': shape.num_layers is 6; the checks need 4" in said.err
    code, said = run("--set", "backbone.layers=4", "mask.window=2")
    assert code == 0, said
    shown = " ".join(said.out.split())
    assert "backbone 'llama_of_mine' with none, latent_thoughts" in shown
    assert "mask 'mask_of_mine' with none, latent_thoughts" in shown
    assert said.out.count("all checks hold") == 2
    assert all(shown.count(check) >= 1 for check in CHECKS)
    for settings, message in [
        (("backbone.layers=4", "mask.size=2"), "mask.size: unknown option"),
        (("backbone.layers=4", "window=2"), "backbone.window: unknown option"),
        (("backbone.layers=4", "recurrence.thoughts=2"), "backbone.recurrence: unknown option"),
    ]:
        code, said = run("--set", *settings)
        assert code == 2
        assert message in said.err
