"""The conformance kit on backbones and masks: mistakes in them are caught by the check meant for them."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lattice
from lattice import cli, register
from lattice.components.backbone.llama import Llama
from lattice.protocols import Mask
from lattice.testing import BACKBONES, CHECKS, assert_conforms, check_component


@register("backbone", "test_costly")
@dataclass(frozen=True, kw_only=True)
class Costly(Llama):
    """It declares half of what its attention costs."""

    @property
    def layer_cost(self):
        cost = super().layer_cost
        return replace(cost, attention=cost.attention // 2)


@register("backbone", "test_last")
@dataclass(frozen=True, kw_only=True)
class Last(Llama):
    """It declares that a layer ends with a product of half the size: block checkpointing would seem dear."""

    @property
    def layer_cost(self):
        cost = super().layer_cost
        return replace(cost, last=cost.last // 2)


@register("backbone", "test_narrow")
@dataclass(frozen=True, kw_only=True)
class Narrow(Llama):
    """It declares no wide products: selective checkpointing would seem to compute nothing again."""

    @property
    def layer_cost(self):
        return replace(super().layer_cost, wide=(0, 0, 0))


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


@register("mask", "test_chunked")
@dataclass(frozen=True, kw_only=True)
class Chunked(Mask):
    """Chunks of the row, of which a token sees its own: with padding before it, another one."""

    size: int = 4
    needs_documents: bool = False

    def sees(self, query, key):
        return query.token // self.size == key.token // self.size


@register("mask", "test_sinks")
@dataclass(frozen=True, kw_only=True)
class Sinks(Mask):
    """It asks for the first of all keys, which one pair does not have."""

    needs_documents = False

    def sees(self, query, key):
        return (query.position - key.position < 3) | (key.position == key.position[..., :1])


@register("mask", "test_no_tensor")
@dataclass(frozen=True, kw_only=True)
class NoTensor(Mask):
    """Where there are no documents it says so by a bool."""

    needs_documents = False

    def sees(self, query, key):
        return query.document == key.document


@register("mask", "test_forgetful")
@dataclass(frozen=True, kw_only=True)
class Forgetful(Mask):
    """Its option changes whenever it is read."""

    window: int = 40
    needs_documents = False

    def __post_init__(self):
        object.__setattr__(self, "window", self.window + 1)

    def sees(self, query, key):
        return query.position - key.position < self.window


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
        {"kind": "document", "window": 2},
    ],
    ids=lambda table: "-".join(map(str, table.values())),
)
def test_masks_conform(table):
    assert_conforms(table, role="mask")


def test_a_backbone_conforms():
    assert_conforms({"kind": "gpt_neox", "use_parallel_residual": False}, role="backbone")


def test_mistakes_are_caught():
    assert broken("backbone", "test_costly", ["shapes", "causality", "cost"]) == {"cost"}
    assert broken("backbone", "test_last", ["shapes", "cost"]) == {"cost"}
    assert broken("backbone", "test_narrow", ["shapes", "cost"]) == {"cost"}
    assert "causality" in broken("backbone", "test_smoothed", ["shapes", "causality"])
    assert broken("mask", "test_even", ["shapes", "causality", "batch and padding"]) == {"batch and padding"}
    assert broken("mask", "test_documents_unseen") == {"documents"}
    assert broken("mask", "test_sinks", ["shapes", "causality", "pairs"]) == {"pairs"}
    assert broken("mask", "test_forgetful", ["shapes", "save and load"]) == {"save and load"}


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7, 8, 16, 27])
def test_what_padding_and_documents_shift_is_caught_whatever_its_size(size):
    (one, _) = check_component("mask", {"kind": "test_chunked", "size": size}, checks=["batch and padding"])
    assert not one.held
    table = {"kind": "test_chunked", "size": size, "needs_documents": True}
    (one, _) = check_component("mask", table, checks=["documents"])
    assert not one.held


def test_what_a_mask_says_is_named():
    (one, _) = check_component("mask", {"kind": "test_no_tensor"}, checks=["shapes"])
    assert (
        "mask 'test_no_tensor': sees() gave True; must be None, or a tensor of booleans" in one.counterexample
    )


class Gain(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(size))

    def forward(self, x):
        return self.gain * x


class SetGain(Gain):
    def reset_parameters(self):
        nn.init.constant_(self.gain, 0.5)


@register("backbone", "test_gained")
@dataclass(frozen=True, kw_only=True)
class Gained(Llama):
    """Its last norm has a gain, too."""

    gains = SetGain
    layers = 0

    @property
    def shape(self):
        return replace(super().shape, num_layers=self.num_hidden_layers + self.layers)

    def build(self):
        decoder = super().build()
        decoder.model.norm = nn.Sequential(decoder.model.norm, self.gains(self.hidden_size))
        return decoder


def test_a_parameter_is_set_by_its_module_or_named(monkeypatch):
    recipe = {"backbone": {**BACKBONES["llama"], "kind": "test_gained"}, "recurrence": {"kind": "none"}}
    state = lattice.build_model(recipe).state_dict()
    assert (state["decoder.model.norm.1.gain"] == 0.5).all()
    assert (state["decoder.model.norm.0.weight"] == 1).all()
    monkeypatch.setattr(Gained, "gains", Gain)
    with pytest.raises(
        ValueError, match=r"nothing sets parameter 'model\.norm\.1\.gain'.* give Gain a method"
    ):
        lattice.build_model(recipe)


def test_what_is_no_decoder_of_the_declared_shape_is_named(monkeypatch):
    recipe = {"backbone": {**BACKBONES["llama"], "kind": "test_gained"}, "recurrence": {"kind": "none"}}
    monkeypatch.setattr(Gained, "layers", 1)
    with pytest.raises(ValueError, match="backbone 'test_gained': 4 layers; its shape declares 5"):
        lattice.build_model(recipe)
    monkeypatch.setattr(Gained, "build", lambda self: nn.Linear(2, 2))
    with pytest.raises(
        TypeError, match=r"backbone 'test_gained': build\(\) returns a Linear; must be a lattice Dec"
    ):
        lattice.build_model(recipe)


def test_what_cannot_be_checked():
    with pytest.raises(ValueError, match="role = 'loss': must be one of recurrence, backbone, mask"):
        check_component("loss", {"kind": "cross_entropy"})
    with pytest.raises(ValueError, match="recurrence = 'llama': must be one of none, latent_thoughts"):
        assert_conforms({"kind": "causal"}, role="mask", backbone="llama")
    with pytest.raises(ValueError, match="check = 'causality': must be one of documents, pairs"):
        check_component("mask", {"kind": "document"}, checks=["causality"])
    with pytest.raises(ValueError, match=r"backbone 'llama': shape\.num_layers is 3, and must be 4 for"):
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

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "num_hidden_layers", self.layers)


@register("mask", "mask_of_mine")
@dataclass(frozen=True, kw_only=True)
class Window(Document):
    pass


@register("mask", "other_mask_of_mine")
@dataclass(frozen=True, kw_only=True)
class Other(Document):
    width: int = 3
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
    assert "backbone 'llama_of_mine': shape.num_layers is 6, and must be 4 for the checks" in said.err
    code, said = run("--set", "backbone.layers=4", "mask.window=2", "mask.width=4")
    assert code == 0, said
    shown = " ".join(said.out.split())
    assert "backbone 'llama_of_mine' with none, latent_thoughts" in shown
    assert "mask 'mask_of_mine' with none, latent_thoughts" in shown
    assert said.out.count("all checks hold") == 3
    assert all(shown.count(check) >= 1 for check in CHECKS)
    for settings, message in [
        (("backbone.layers=4", "mask.size=2"), "mask.size: unknown option"),
        (("backbone.layers=4", "window=2"), "backbone.window: unknown option"),
        (("backbone.layers=4", "recurrence.thoughts=2"), "backbone.recurrence: unknown option"),
    ]:
        code, said = run("--set", *settings)
        assert code == 2
        assert message in said.err
