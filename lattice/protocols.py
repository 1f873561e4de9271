"""The roles of a recipe: what each part of the house answers.

This page is the table of contents of the project. A *role* is a place in the graph that a component
fills; a *kind* is one component for a role. A component is a frozen, keyword-only dataclass that
inherits its role's Protocol below and carries `@register(role, kind)`: its fields are its options.

Shapes: B batch, L tokens, n stages a token, S = L·n slots, D hidden, V vocabulary, Q queries, K keys.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from lattice.cost import LayerCost as LayerCost
from lattice.cost import Pass as Pass
from lattice.world import World

if TYPE_CHECKING:
    from lattice.cache import KVCache
    from lattice.decoder import Decoder
    from lattice.draws import Draw
    from lattice.memory import StepMemory
    from lattice.model import LanguageModel
    from lattice.slots import Side
    from lattice.spread import Site, Spread
    from lattice.stack import Stack

T = TypeVar("T")


def kind_of(component: Any) -> str:
    """What a recipe calls it."""
    return str(getattr(component, "kind", type(component).__name__))


# ── recurrence ────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, kw_only=True)
class Shape:
    """What other components may know of a backbone."""

    hidden_size: int
    num_layers: int
    vocab_size: int
    context: int
    """Longest sequence in tokens."""
    splits: int
    """Into how many equal parts the heads and the inner width of a layer can be divided, at most: any divisor
    of it will do."""


@dataclass(frozen=True, kw_only=True)
class Initialization:
    """Standard deviations of the weight matrices; biases start at 0, norms at 1."""

    std: float
    residual_std: float
    """Of the two projections a layer adds to the residual stream (attention out, MLP out)."""
    truncate: float | None = None
    """Cut the normal distribution at this many standard deviations."""

    @staticmethod
    def scaled(shape: Shape, additions: int) -> Initialization:
        """That of the latent thoughts (PonderLM-2, arXiv 2509.23184): with embeddings scaled by sqrt(2.5 D)
        a token has the unit scale of a normalised hidden state. `additions` is how often a layer adds to what
        is read in the end: slots of a token, or passes of a residual stream through the layers."""
        std = math.sqrt(2 / (5 * shape.hidden_size))
        residual_std = std / math.sqrt(2 * shape.num_layers * additions)
        return Initialization(std=std, residual_std=residual_std, truncate=3.0)


@dataclass(frozen=True)
class Unrolled:
    """What a recurrence returns: the hidden states that predict, after the final norm."""

    hidden_BLD: Tensor
    telemetry: Mapping[str, Tensor | float] = field(default_factory=dict)
    """Numbers or vectors to log, e.g. `residuals`: relative change at each iteration."""
    also_predict: Sequence[tuple[Tensor, Tensor | float]] = ()
    """Further hidden states (B, L, D), after the final norm, that a training step makes predict the same
    tokens, each with the weight of its loss: a number, as in deep supervision (Lee et al., arXiv 1409.5185),
    or (B, L), one for each token, as where a model learns when to halt (PonderNet, arXiv 2107.05407)."""
    penalty_BL: Tensor | None = None
    """What a training step minimises besides, for each token, in nats."""


class Unroll(Protocol):
    """A recurrence bound to one backbone shape; a module, if it has parameters of its own."""

    @abstractmethod
    def __call__(
        self, stack: Stack, ids_BL: Tensor, *, draw: Draw | None = None, cache: KVCache | None = None
    ) -> Unrolled:
        """All tokens in parallel. `draw` gives the random counts of a training step; None the fixed ones of
        evaluation. To a `cache` the keys and values of the slots that later tokens look at are written."""
        ...

    def step(self, stack: Stack, ids_B1: Tensor, cache: KVCache) -> Tensor:
        """One token, strictly in sequence, after those in `cache`: hidden_B1D that predicts the next.

        As it stands: for a kind whose parallel evaluation is its definition.
        """
        return self(stack, ids_B1, cache=cache).hidden_BLD


class Recurrence(Protocol):
    """How the model thinks before each token."""

    @property
    def slots(self) -> int:
        """Slots a token occupies in the last pass, and in the cache."""
        return 1

    @property
    def positions(self) -> int:
        """Position ids of a token: 1, which all its slots share, or as many as it has slots."""
        return 1

    @property
    def parallel_is_exact(self) -> bool:
        """Whether the parallel evaluation is the definition itself, so that prefill may use it."""
        return True

    @property
    def rows_may_branch(self) -> bool:
        """Whether what a token gets depends at evaluation on the tokens that it sees alone, so that a row may
        hold several continuations of one context. Not where an iteration stops for a whole row."""
        return True

    @abstractmethod
    def passes(self, shape: Shape, *, training: bool) -> list[Pass]:
        """What is computed of each token: in a training step, in the mean over the draws, or at evaluation,
        in parallel. Where iteration may stop early, the limit."""

    def passes_at(self, shape: Shape, step: int) -> list[Pass]:
        """What is computed of each token in training step `step`, counted from 0, in the mean over its draws.
        As it stands: what `passes` says of training, the same in every step. A curriculum says more."""
        return self.passes(shape, training=True)

    def decode_passes(self, shape: Shape) -> list[Pass]:
        """What `step` computes of a token. As it stands: what an evaluation does, of the newest alone."""
        return [dataclasses.replace(one, part=None) for one in self.passes(shape, training=False)]

    def token_passes(self, shape: Shape, *, training: bool) -> float:
        """Mean number of slots sent through the layers, for each token of the sequence."""
        return sum(one.token_passes(shape.num_layers) for one in self.passes(shape, training=training))

    def initialization(self, shape: Shape) -> Initialization:
        """How the backbone's weights are drawn."""
        return Initialization.scaled(shape, 1)

    def embedding_scale(self, shape: Shape) -> float:
        """By what the embeddings of tokens are multiplied. Weights mean something else at another scale: who
        goes on from some, with another recurrence, keeps theirs if it has an option `embed_scale`."""
        return 1.0

    def reserved_ids(self, shape: Shape) -> tuple[int, ...]:
        """Rows of the embedding table that the recurrence uses and no text may."""
        return ()

    def with_thoughts(self, count: int) -> Recurrence:
        """The same recurrence, thinking `count` times before each token: what the option is called differs.
        Raises ValueError where there is no such count, or not this one."""
        raise ValueError(
            f"thoughts = {count}: recurrence '{kind_of(self)}' cannot be given another number of thoughts: "
            "it has no method `with_thoughts(count)`"
        )

    def with_iterations(self, count: int) -> Recurrence:
        """The same recurrence with `count` iterations at evaluation: if its parallel evaluation is not exact,
        as many as a text has slots bring it to the definition.

        As it stands: for options that are tables with a count `eval`, each of which becomes `count`.
        Raises ValueError where there is no such count, or not this one.
        """
        component: Any = self
        values = {option.name: getattr(self, option.name) for option in dataclasses.fields(component)}
        counts: dict[str, Any] = {
            name: dataclasses.replace(value, eval=count)  # type: ignore[type-var]
            for name, value in values.items()
            if dataclasses.is_dataclass(value) and hasattr(value, "eval")
        }
        if not counts:
            raise ValueError(
                f"iterations = {count}: recurrence '{kind_of(self)}' does not iterate: it has no method "
                "`with_iterations(count)`, and no option that is a table with a count `eval`"
            )
        iterated: Recurrence = dataclasses.replace(component, **counts)
        return iterated

    @abstractmethod
    def build(self, shape: Shape) -> Unroll:
        """Raises ValueError, beginning with the option's name, for options that this shape does not allow."""


# ── model ─────────────────────────────────────────────────────────────────────────────────────────
class Backbone(Protocol):
    """Embedding, layers, final norm and head."""

    @property
    @abstractmethod
    def shape(self) -> Shape: ...

    @property
    @abstractmethod
    def layer_cost(self) -> LayerCost: ...

    @abstractmethod
    def build(self) -> Decoder:
        """The module, on the current default device, weights not initialised."""

    def to_hf(self) -> dict[str, Any] | None:
        """The `config.json` by which transformers computes the same; None where it has no such architecture,
        as it stands. It counts where the kind that reads it makes this component of it: what is inherited is
        the base's."""
        return None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Backbone | None:
        """The component that a `config.json` of transformers describes; None if it is not of this kind. Only
        the class that defines this method is asked. Raises ValueError for a setting of that architecture that
        this kind does not implement."""
        return None


class Mask(Protocol):
    """Which slots a slot may look at, within the causal order over real slots, which always holds."""

    @property
    @abstractmethod
    def needs_documents(self) -> bool:
        """Whether the batch must say which document each token belongs to."""

    @abstractmethod
    def sees(self, query: Side, key: Side) -> Tensor | None:
        """For each pair of slots whether the query may look at the key; None where nothing more than the
        causal order is asked. One function of the two sides' attributes, in operations that broadcast: it is
        asked about all pairs at once, and by FlexAttention about one pair."""


class Precision(Protocol):
    """In which number formats the model computes."""

    @abstractmethod
    def apply(self, model: nn.Module) -> None: ...

    @abstractmethod
    def autocast(self, device: torch.device) -> AbstractContextManager[Any]: ...

    @property
    def weights(self) -> torch.dtype:
        """In which format matrix products read the weights of the layers."""
        return torch.float32

    @property
    def as_in_memory(self) -> Precision:
        """A precision that keeps as much for the backward pass and runs on every device: what memory is
        predicted with."""
        return self


class ActivationCheckpoint(Protocol):
    """What is kept of the forward pass and what is computed again in the backward pass."""

    def again(self, cost: LayerCost) -> list[LayerCost]:
        """What the backward pass computes again of a layer that costs `cost`, one for each time that it calls
        the layer."""
        return []

    @abstractmethod
    def block(self, call: Callable[..., T]) -> Callable[..., T]:
        """Wraps the call of one layer."""

    @abstractmethod
    def whole_pass(self, call: Callable[..., T]) -> Callable[..., T]:
        """Wraps one pass through a run of layers."""


class Compile(Protocol):
    """What torch.compile makes graphs of, while training."""

    @abstractmethod
    def apply(self, model: LanguageModel) -> None:
        """Compiles in place, when it is first called."""


class Loss(Protocol):
    """From hidden states to a loss. It holds the head, so chunking over the vocabulary is its business."""

    @abstractmethod
    def total(
        self, hidden_ND: Tensor, head: nn.Module, targets_N: Tensor, weights_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Summed loss in nats, of each target times its weight if weights are given, which have gradients,
        too; and the number of targets that count (those that are not -100)."""


# ── training ──────────────────────────────────────────────────────────────────────────────────────
class Parallel(Protocol):
    """Over which ranks a run is spread, and how."""

    @abstractmethod
    def together(self, size: int) -> int:
        """How many neighbouring ranks of `size` work on the same sequences. Raises ValueError, beginning with
        the option's name, where so many ranks cannot be arranged."""

    def problems(self, shape: Shape, length: int, size: int) -> list[str]:
        """What of a model and of sequences of `length` tokens cannot be divided among `size` ranks."""
        return []

    def memory(self, alone: StepMemory, size: int, *, gathered: bool) -> StepMemory:
        """Of a rank, from that of a process alone; `gathered`: with all weights and gradients there
        throughout a step."""
        return alone

    def tokens(self, batch_tokens: int) -> int:
        """How many of the tokens of a micro-batch a rank has."""
        return batch_tokens

    def shard(self, model: LanguageModel, site: Site) -> None:
        """Divides the weights, before there are any: they are on the meta device."""
        return

    @abstractmethod
    def spread(self, model: LanguageModel, site: Site) -> Spread:
        """Once the model has its weights."""


class Optimizer(Protocol):
    lr: float
    """Peak learning rate, multiplied by the schedule."""
    grad_clip: float
    """Largest global gradient norm; 0 for no clipping."""

    @abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """A checkpoint keeps the tensors of its state, and what JSON can hold of its parameter groups. The
        `lr` of each group is its peak: all follow the schedule."""


class Schedule(Protocol):
    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """Multiplier of the learning rate at `step` of 0..steps-1."""


class Codec(Protocol):
    """A tokenizer that is ready to use."""

    vocab_size: int
    eos_id: int
    """Written after every document."""
    fingerprint: str
    """Equal for two tokenizers exactly if they encode alike."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, no special tokens added. Uses all cores."""
        ...

    def decode(self, ids: list[int]) -> str: ...


class Tokenizer(Protocol):
    @abstractmethod
    def build(self, folder: Path | None, corpus: Callable[[], Iterator[str]] | None = None) -> Codec:
        """Opens the tokenizer: from `folder` where it was saved before, else from its source, then saved
        to `folder`. A kind that is trained trains on `corpus`. Raises FileNotFoundError or ValueError
        that says what is missing and how to provide it."""

    @property
    @abstractmethod
    def spec(self) -> str:
        """What `lattice prepare --tokenizer` takes to make data for this tokenizer."""

    @classmethod
    @abstractmethod
    def from_spec(cls, spec: str) -> Tokenizer | None:
        """The component that `lattice prepare --tokenizer SPEC` names; None for a spec of another kind. Only
        the class that defines this method is asked."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Targets are already shifted; -100 does not count."""

    ids_BL: Tensor
    targets_BL: Tensor
    documents_BL: Tensor | None = None
    identity: str = ""
    """Where it came from, for messages: epoch and sequence numbers."""

    def to(self, device: torch.device) -> Batch:
        documents_BL = None if self.documents_BL is None else self.documents_BL.to(device)
        return Batch(self.ids_BL.to(device), self.targets_BL.to(device), documents_BL, self.identity)


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """What training asks of a data component."""

    codec: Codec
    cache: Path
    """A folder for what is worth keeping between runs on this machine."""
    sequence_tokens: int
    micro_batch: int
    """Sequences a rank takes at once."""
    batch: int
    """Sequences an optimizer step takes, over all ranks and accumulation steps."""
    documents: bool
    """Whether batches carry documents_BL."""
    seed: int
    rank: int = 0
    world_size: int = 1


class Source(Protocol):
    """An opened data component."""

    validation_bytes_per_token: float
    """UTF-8 bytes of the validation text divided by its tokens: turns nats a token into bits a byte."""
    fingerprints: dict[str, str]
    """Of the training tokens, the validation tokens and the tokenizer, by their content alone, under names of
    the source's own: the losses of two runs compare if all of these agree."""

    def steps(self, first: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each optimizer step from step `first` on, without end."""
        ...

    def validation(self, max_tokens: int) -> Iterator[Batch]:
        """Windows spread evenly over the held-out text, this rank's share, at most `max_tokens` over all
        ranks. Every rank gets the same number of batches of the same shape."""
        ...

    def validation_documents(self, most: int | None = None) -> Iterator[list[int]]:
        """The held-out documents one by one, at most `most`: token ids without that of the document's end."""
        ...

    def position(self, step: int) -> dict[str, Any]:
        """Where `step` stands in the data; saved in checkpoints and compared when one is resumed."""
        ...


class Data(Protocol):
    @abstractmethod
    def problems(self, tokenizer: str) -> list[str]:
        """What keeps this component from being opened, found without reading the data; each a sentence
        that says how to provide what is missing. `tokenizer` is the spec of the recipe's."""

    @abstractmethod
    def corpus(self) -> Callable[[], Iterator[str]] | None:
        """The training documents as text, if a tokenizer can be trained on them."""

    @abstractmethod
    def open(self, request: DataRequest) -> Source: ...


Held: TypeAlias = dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]
"""Tensors of a checkpoint in nested dicts, or what gives them from its facts, which say what it holds."""


class Checkpointer(Protocol):
    """Saves and restores the state of one run. Of several ranks all call the same methods in the same order,
    and what fails on one raises on all at the same call."""

    def save(self, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """Starts saving. Raises OSError if an earlier save turns out to have failed."""
        ...

    def poll(self) -> None:
        """Called once a step. Raises OSError if a save that was started has failed already; does not wait for
        it to end."""
        ...

    def wait(self) -> None:
        """Until what was started is on disk under its final name. Raises OSError if it is not."""
        ...

    def candidates(self) -> list[Path]:
        """The complete checkpoints, the latest first."""
        ...

    def latest(self) -> Path | None:
        """The first of the candidates."""
        ...

    def load(self, path: Path, tensors: Held) -> dict[str, Any]:
        """Fills `tensors` in place, returns the facts. Top-level entries of the checkpoint that `tensors`
        lacks are left out. Never executes code from the checkpoint. Raises ValueError, with nothing changed,
        for a damaged checkpoint and for one of another model."""
        ...

    def load_latest(self, tensors: Held) -> tuple[Path, dict[str, Any]] | None:
        """Loads the latest candidate that is intact, with a warning for each that is not; None where there
        is no candidate. Raises ValueError if none is intact or the checkpoint is of another model."""
        ...


class Checkpoint(Protocol):
    every: int

    @abstractmethod
    def build(self, folder: Path) -> Checkpointer: ...


class MetricWriter(Protocol):
    def log(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Metrics(Protocol):
    @abstractmethod
    def build(self, folder: Path, first_step: int) -> MetricWriter: ...


class Evaluator(Protocol):
    every: int
    """Steps between evaluations while training; 0 for the end only. Neither this nor an option named `batch`,
    how much is looked at at once, may change a figure."""
    gives_loss: ClassVar[bool] = False
    """Whether its figures have a `loss`, in nats a token, by which runs compare."""

    @abstractmethod
    def evaluate(self, subject: EvaluationSubject) -> dict[str, float | str]:
        """Figures, and texts to look at, by name."""

    def check(self, subject: EvaluationSubject) -> None:
        """Asked before the first step of a training, on the first rank alone. Raises ValueError, OSError or
        ImportError for what would keep `evaluate` from its work; computes nothing with the model."""


@dataclass(frozen=True)
class EvaluationSubject:
    """What an evaluator may use."""

    model: LanguageModel
    codec: Codec
    open_source: Callable[[], Source]
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    step: int
    """Optimizer steps that the weights have taken."""
    world: World = field(default_factory=World)
    """All ranks evaluate, each its share of the text: sums are over all."""

    @cached_property
    def source(self) -> Source:
        """The recipe's data, opened when it is first asked for."""
        return self.open_source()


@dataclass(frozen=True, kw_only=True)
class Role:
    protocol: type
    named: bool = False
    """Whether the recipe's table holds named members, `[metrics.board]`, rather than one component."""
    table: str = ""
    """Name of the recipe's table if it is not the role's own."""


ROLES: dict[str, Role] = {
    "backbone": Role(protocol=Backbone),
    "recurrence": Role(protocol=Recurrence),
    "mask": Role(protocol=Mask),
    "loss": Role(protocol=Loss),
    "precision": Role(protocol=Precision),
    "activation_checkpoint": Role(protocol=ActivationCheckpoint),
    "compile": Role(protocol=Compile),
    "parallel": Role(protocol=Parallel),
    "optimizer": Role(protocol=Optimizer),
    "schedule": Role(protocol=Schedule),
    "tokenizer": Role(protocol=Tokenizer),
    "data": Role(protocol=Data),
    "checkpoint": Role(protocol=Checkpoint),
    "metrics": Role(protocol=Metrics, named=True),
    "evaluator": Role(protocol=Evaluator, named=True, table="evaluators"),
}
TABLES: dict[str, str] = {role.table or name: name for name, role in ROLES.items()}
"""Recipe table name -> role name."""
