"""The language model: a backbone, a recurrence over it, a mask and a loss.

Shapes: B batch, L tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lattice.cache import KVCache
from lattice.decoder import check_decoder
from lattice.draws import Draw
from lattice.hardware import any_length
from lattice.protocols import (
    ActivationCheckpoint,
    Backbone,
    Loss,
    Mask,
    Recurrence,
    Unroll,
    Unrolled,
    kind_of,
)
from lattice.registry import check_unroll, lookup
from lattice.slots import Tokens, check_alike
from lattice.split import Split
from lattice.stack import Stack

AUXILIARY = "auxiliary_loss"
"""The name in the metrics of what a recurrence adds to the loss of a training step, in nats a token."""
LOGGED = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", AUXILIARY)
"""What a run logs of each step, so that telemetry has other names."""


@dataclass
class Output:
    """What a forward returns: logits, or with targets their loss."""

    logits: Tensor | None = None
    """(B, L, V); None where targets were given."""
    loss_sum: Tensor | None = None
    """Nats, summed over the targets that count."""
    count: Tensor | None = None
    """How many targets count."""
    telemetry: dict[str, Tensor] = field(default_factory=dict)
    passes: int = 0
    """How often slots were sent through layers: ranks that train together must do so equally often."""
    auxiliary_sum: Tensor | None = None
    """Nats, summed over those targets, that the recurrence adds to the loss of a training step."""

    @property
    def objective_sum(self) -> Tensor | None:
        """What a training step minimises, summed: the loss, and what the recurrence adds to it."""
        if self.loss_sum is None or self.auxiliary_sum is None:
            return self.loss_sum
        return self.loss_sum + self.auxiliary_sum

    @property
    def objective(self) -> Tensor | None:
        """What a training step minimises, in the mean over the targets."""
        return self._mean(self.objective_sum)

    @property
    def loss(self) -> Tensor | None:
        """Mean loss in nats a token."""
        return self._mean(self.loss_sum)

    def _mean(self, total: Tensor | None) -> Tensor | None:
        return None if total is None or self.count is None else total / self.count


class LanguageModel(nn.Module):
    """Logits for the next token, after thinking as the recurrence says.

    The number of iterations is the fixed one of evaluation unless a `draw` is given, so that a forward is
    a function of its inputs in training mode as well.
    """

    def __init__(
        self,
        backbone: Backbone,
        recurrence: Recurrence,
        mask: Mask,
        loss: Loss,
        checkpointing: ActivationCheckpoint,
        *,
        unroll: Unroll | None = None,
    ) -> None:
        """`unroll`: what the recurrence has built; built here if not given."""
        super().__init__()
        self.components: dict[str, Any] = {"backbone": backbone, "recurrence": recurrence, "mask": mask}
        self.decoder = backbone.build()
        check_decoder(self.decoder, kind_of(backbone), backbone.shape)
        self.unroll = recurrence.build(backbone.shape) if unroll is None else unroll
        check_unroll(self.unroll)
        self.shape = backbone.shape
        self.mask = mask
        self.loss = loss
        self.measure: Loss = lookup("loss", "cross_entropy")()
        """What is reported of held-out text, whatever a training minimises, so that models compare."""
        self.checkpointing = checkpointing
        self.split: Split | None = None
        """Set where several ranks share a sequence in training."""

    @property
    def recurrence(self) -> Recurrence:
        """The recurrence component that this model was built from."""
        recurrence: Recurrence = self.components["recurrence"]
        return recurrence

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        targets: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Output:
        """All tokens in parallel.

        `input_ids` (B, L); `attention_mask` (B, L), 0 for padding; `documents` (B, L), document numbers of
        a packed batch; `targets` (B, L), already shifted, -100 does not count: with them the output holds
        the loss in place of the logits, in training mode or with a `draw` the one that the recipe says,
        otherwise cross entropy. Raises ValueError for a sequence longer than the context and for
        shapes that are not alike.
        """
        check_alike(input_ids, targets=targets)
        stack, unrolled = self.unrolled(input_ids, attention_mask, documents, draw)
        if targets is not None:
            targets = stack.mine(targets)
        if targets is None:
            logits_BLV = stack.logits(unrolled.hidden_BLD)
            return Output(logits_BLV, telemetry=self._telemetry(unrolled), passes=stack.passes)
        loss = self.loss if self.training or draw is not None else self.measure
        loss_sum, count = self._loss(loss, unrolled.hidden_BLD, targets)
        adds = draw is not None and (unrolled.also_predict or unrolled.penalty_BL is not None)
        return Output(
            loss_sum=loss_sum,
            count=count,
            telemetry=self._telemetry(unrolled),
            passes=stack.passes,
            auxiliary_sum=self._auxiliary(unrolled, targets) if adds else None,
        )

    def _loss(
        self, loss: Loss, hidden_BLD: Tensor, targets_BL: Tensor, *weights_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        by_token = (tensor.flatten() for tensor in (targets_BL, *weights_BL))
        return loss.total(hidden_BLD.flatten(0, 1), self.decoder.head, *by_token)

    def _auxiliary(self, unrolled: Unrolled, targets_BL: Tensor) -> Tensor:
        """Raises ValueError for other shapes than those of the tokens, TypeError for what is no weight."""
        total = unrolled.hidden_BLD.new_zeros((), dtype=torch.float32)
        for hidden_BLD, weight in unrolled.also_predict:
            self._check_shape("also_predict", hidden_BLD, unrolled.hidden_BLD.shape)
            if not isinstance(weight, Tensor | int | float):
                raise TypeError(
                    f"recurrence '{kind_of(self.recurrence)}': a weight of also_predict is a "
                    f"{type(weight).__name__}; must be a number or a tensor"
                )
            if isinstance(weight, Tensor) and weight.dim():
                self._check_shape("a weight of also_predict", weight, targets_BL.shape)
                total = total + self._loss(self.loss, hidden_BLD, targets_BL, weight)[0]
            else:
                total = total + weight * self._loss(self.loss, hidden_BLD, targets_BL)[0]
        if unrolled.penalty_BL is not None:
            self._check_shape("penalty_BL", unrolled.penalty_BL, targets_BL.shape)
            total = total + unrolled.penalty_BL.float().masked_fill(targets_BL == -100, 0).sum()
        return total

    def _check_shape(self, name: str, given: Tensor, shape: tuple[int, ...]) -> None:
        if given.shape != shape:
            raise ValueError(
                f"recurrence '{kind_of(self.recurrence)}': {name} holds a tensor of shape "
                f"{tuple(given.shape)}; must be {tuple(shape)}"
            )

    def _telemetry(self, unrolled: Unrolled) -> dict[str, Tensor]:
        """In float32, detached. Raises TypeError for what is no number and no vector of them, ValueError for
        a name that is taken."""
        found: dict[str, Tensor] = {}
        if taken := [name for name in LOGGED if name in unrolled.telemetry]:
            raise ValueError(
                f"recurrence '{kind_of(self.recurrence)}': telemetry '{taken[0]}': the run itself logs this; "
                "choose another name"
            )
        for name, value in unrolled.telemetry.items():
            tensor = torch.tensor(value) if isinstance(value, int | float) else value
            if not isinstance(tensor, Tensor) or tensor.dim() > 1 or tensor.is_complex():
                shape = f" of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else ""
                raise TypeError(
                    f"recurrence '{kind_of(self.recurrence)}': telemetry '{name}' is a {type(value).__name__}"
                    f"{shape}; must be a real number, or a tensor of one or of a vector"
                )
            found[name] = tensor.detach().float()
        return found

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, branches: Tensor | None = None
    ) -> Tensor:
        """What the head turns into logits, (B, L, D), as in `forward`: for those who need few of them.

        With `branches` (B, L) a row holds several continuations of a context: the context's tokens, 0, and
        then one continuation after the other, 1, 2 and so on. Each gets what it gets in a row of
        its own after the context. Raises ValueError where the recurrence cannot do this.
        """
        if branches is not None and not self.recurrence.rows_may_branch:
            raise ValueError("branches: with this recurrence the tokens of a row depend on all of it")
        return self.unrolled(input_ids, attention_mask, branches=branches)[1].hidden_BLD

    @any_length()
    def unrolled(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        documents: Tensor | None = None,
        draw: Draw | None = None,
        branches: Tensor | None = None,
    ) -> tuple[Stack, Unrolled]:
        """What the recurrence makes of the tokens, and the stack that turns it into logits; raises as
        `forward`."""
        self._check_length(input_ids.shape[1])
        stack = self._stack(Tokens.of(input_ids, attention_mask, documents, branches))
        ids_BL = stack.mine(input_ids)
        unrolled = self.unroll(stack, ids_BL, draw=draw)
        if not isinstance(unrolled, Unrolled):
            raise ValueError(
                f"recurrence '{kind_of(self.recurrence)}': returns a {type(unrolled).__name__}; must be a "
                "lattice.protocols.Unrolled"
            )
        self._check_shape("hidden_BLD", unrolled.hidden_BLD, (*ids_BL.shape, self.shape.hidden_size))
        return stack, unrolled

    @torch.no_grad()
    @any_length()
    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, parallel: bool = False
    ) -> tuple[Tensor, KVCache]:
        """Logits (B, V) after the last token of a prompt (B, L), and the cache to go on from.

        Thoughts are computed strictly in sequence; with `parallel` by the solver, at its evaluation
        settings, which is faster and, for thoughts, an approximation.
        """
        if input_ids.shape[1] < 1:
            raise ValueError("input_ids: the prompt is empty; must have at least one token")
        self._check_length(input_ids.shape[1])
        check_alike(input_ids, attention_mask=attention_mask)
        cache = self.cache()
        if parallel or self.recurrence.parallel_is_exact:
            stack = self._stack(Tokens.of(input_ids, attention_mask))
            hidden_BLD = self.unroll(stack, input_ids, cache=cache).hidden_BLD
            return stack.logits(hidden_BLD[:, -1]), cache
        logits_BV = torch.empty(0)
        for at in range(input_ids.shape[1]):
            present = None if attention_mask is None else attention_mask[:, at : at + 1]
            logits_BV = self.step(input_ids[:, at : at + 1], cache, present)
        return logits_BV, cache

    def cache(self) -> KVCache:
        """An empty cache to decode with."""
        return KVCache(self.shape.num_layers)

    @torch.no_grad()
    @any_length()
    def step(
        self,
        ids_B1: Tensor,
        cache: KVCache,
        attention_mask_B1: Tensor | None = None,
        documents_B1: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, V) after one more token, its thoughts computed in sequence through the cache.

        Raises ValueError for other rows than the cache holds, and for a mask or documents where the tokens
        in the cache had none.
        """
        _check_step(ids_B1, cache, attention_mask_B1, documents_B1)
        first = cache.tokens
        self._check_length(first + 1)
        past_real_B = cache.real_tokens()
        tokens = Tokens.of(ids_B1, attention_mask_B1, documents_B1, first=first, past_real_B=past_real_B)
        stack = self._stack(tokens)
        return stack.logits(self.unroll.step(stack, ids_B1, cache)[:, -1])

    def _stack(self, tokens: Tokens) -> Stack:
        positions = self.recurrence.positions
        return Stack(
            self.decoder, self.mask, self.checkpointing, tokens, positions=positions, split=self.split
        )

    def _check_length(self, length: int) -> None:
        if length > self.shape.context:
            raise ValueError(
                f"{length} tokens do not fit the model's context of {self.shape.context}: shorten the input "
                "or raise backbone.max_position_embeddings"
            )


def _check_step(
    ids_B1: Tensor, cache: KVCache, attention_mask_B1: Tensor | None, documents_B1: Tensor | None
) -> None:
    if ids_B1.dim() != 2 or ids_B1.shape[1] != 1:
        raise ValueError(f"ids_B1: a step takes one token of each row, (B, 1), not {tuple(ids_B1.shape)}")
    if cache.rows not in (None, len(ids_B1)):
        raise ValueError(f"ids_B1: must have the {cache.rows} rows of the cache, not {len(ids_B1)}")
    if cache.slots is None:
        return
    if attention_mask_B1 is not None and cache.slots.real_BS is None:
        raise ValueError("attention_mask_B1: must be None, as for the tokens in the cache, which had no mask")
    if documents_B1 is not None and cache.slots.document_BS is None:
        raise ValueError("documents_B1: must be None, as for the tokens in the cache, which had no documents")
    if documents_B1 is None and cache.slots.document_BS is not None:
        raise ValueError("documents_B1: missing; the tokens in the cache had documents")
