"""A model of ours as transformers sees it: `PreTrainedModel` with `generate`.

Written against transformers 5 and kept loadable by 4.46. The parameters are registered under Hugging Face's
own names, and those of a recurrence under `recurrence.`; the LanguageModel works on the same modules.

Shapes: B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lattice.build import build_model, undrawn_model
from lattice.cache import KVCache
from lattice.hf.directory import MODEL_TYPE, RECURRENCE, TABLES
from lattice.model import LanguageModel
from lattice.recipe import load_recipe

CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls it: `past_key_values` before 5.24."""


class Config(PretrainedConfig):
    """The recipe's tables of a model. Options of the backbone are attributes, too: `hidden_size`, …"""

    model_type = MODEL_TYPE

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        recurrence: dict[str, Any] | None = None,
        mask: dict[str, Any] | None = None,
        parallel_prefill: bool = False,
        tie_word_embeddings: bool = False,
        **others: Any,
    ) -> None:
        """`parallel_prefill`: while generating, the thoughts of the prompt come from the solver, as in
        training, rather than strictly in sequence: faster, and an approximation."""
        self.recurrence = recurrence or {}
        self.mask = mask or {}
        self.parallel_prefill = parallel_prefill
        super().__init__(**others)
        self.tie_word_embeddings = tie_word_embeddings  # the base class of 4.x has another default
        self.backbone = dict(backbone or {})  # last: from here on its options are attributes

    def _is_option(self, name: str) -> bool:
        return name != "kind" and name in self.__dict__.get("backbone", {})

    def __getattr__(self, name: str) -> Any:
        if self._is_option(name):
            return self.backbone[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """What `__getattr__` reads from the backbone's table is set there: the model is built from it."""
        if self._is_option(name) and name not in self.__dict__:
            self.backbone[name] = value
        else:
            super().__setattr__(name, value)

    def tables(self) -> dict[str, Any]:
        """The tables that say what model it is; one that is empty is a recipe's default."""
        return {role: getattr(self, role) for role in TABLES if getattr(self, role)}


class Cache:
    """What generation carries from token to token: all slots' keys and values."""

    is_compileable = False
    is_croppable = False
    is_linear = (False,)
    """By layer, for transformers since 5.24, which else takes the whole text for new tokens."""

    def __init__(self) -> None:
        self.slots: KVCache | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens, not slots."""
        return 0 if self.slots is None else self.slots.tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError("beam search: this model's cache cannot be reordered; set use_cache=False")


class ForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits for the next token, after thinking as the recurrence says."""

    config_class: type[Config] = Config
    _computing: LanguageModel
    _is_stateful = True  # the cache cannot go back: no assisted generation

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        recipe = load_recipe(config.tables())
        on_meta = nn.Linear(1, 1).weight.is_meta  # 4.5x moves parameters there one by one, and no buffers
        model = undrawn_model(recipe) if on_meta else build_model(recipe)
        # Not a submodule: its parts are, under the names that the weights have in the directory.
        object.__setattr__(self, "_computing", model)
        self._was_drawn = not on_meta
        for name, child in model.decoder.named_children():
            self.add_module(name, child)
        if isinstance(model.unroll, nn.Module):
            self.add_module(RECURRENCE.removesuffix("."), model.unroll)
        self._set_tie()
        # A layer is called in parts: on several devices it must lie on one.
        self._no_split_modules = {type(block).__name__ for block in model.decoder.blocks}
        self.post_init()

    @property
    def _model(self) -> LanguageModel:
        """With what has taken the place of a part here, such as a head's, by hand or by quantization."""
        for name, part in self._modules.items():
            of_recurrence = name == RECURRENCE.removesuffix(".")
            owner, at = (self._computing, "unroll") if of_recurrence else (self._computing.decoder, name)
            if at in owner._modules and owner._modules[at] is not part:
                owner._modules[at] = part
        return self._computing

    def _set_tie(self) -> None:
        names = {id(module): name for name, module in self.named_modules()}
        embedding, head = self._model.decoder.embedding, self._model.decoder.head
        # Moving parameters one by one to the meta device parts what is tied.
        tied = head.weight is embedding.weight or self.config.tie_word_embeddings
        self.config.tie_word_embeddings = tied
        if tied:  # transformers 4 takes the keys alone
            self._tied_weights_keys = {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}

    # ── weights ───────────────────────────────────────────────────────────────────────────────────
    def get_input_embeddings(self) -> nn.Module:
        return self._model.decoder.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self._model.decoder.head

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: the recipe's tables fix the vocabulary."""
        raise NotImplementedError("the embeddings cannot be replaced: the number of tokens is fixed")

    set_output_embeddings = set_input_embeddings

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Refused, but for the present size, before transformers changes the weights in place."""
        size = self._model.shape.vocab_size
        wanted = size if new_num_tokens is None else new_num_tokens
        wanted += -wanted % (pad_to_multiple_of or 1)
        if wanted != size:
            raise NotImplementedError(
                f"{wanted} tokens: their number is fixed at {size}: set backbone.vocab_size when training"
            )
        return self.get_input_embeddings()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What a file lacks. A model that was not built on the meta device has been drawn already."""
        tied = module is self._model.decoder.head and self.config.tie_word_embeddings
        if self._was_drawn or tied:
            return
        for kind, fresh in self._fresh(module).items():
            for name, tensor in getattr(module, f"named_{kind}")(recurse=False):
                if not getattr(tensor, "_is_hf_initialized", False):
                    tensor.copy_(fresh[name])

    def _fresh(self, module: nn.Module) -> dict[str, dict[str, Tensor]]:
        """Newly drawn parameters and buffers of a module, by name."""
        name = next(name for name, one in self.named_modules() if one is module)
        with torch.device("cpu"):
            if name == RECURRENCE.removesuffix(".") or name.startswith(RECURRENCE):
                whole: Any = self._model.recurrence.build(self._model.shape)
                name = name.removeprefix(RECURRENCE.removesuffix(".")).removeprefix(".")
            elif any(True for _ in module.parameters(recurse=False)):
                raise ValueError(f"the weights of {name} are missing from the directory")
            else:
                whole = self._model.components["backbone"].build()
        fresh: nn.Module = whole.get_submodule(name)
        return {
            "parameters": dict(fresh.named_parameters(recurse=False)),
            "buffers": dict(fresh.named_buffers(recurse=False)),
        }

    def train(self, mode: bool = True) -> ForCausalLM:
        self._model.train(mode)
        super().train(mode)
        return self

    # ── forward ───────────────────────────────────────────────────────────────────────────────────
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits (B, L, V), and with `labels` (B, L), not shifted, the mean loss in nats.

        `attention_mask` (B, L, or with a cache of P tokens P + L) is 0 for padding. Without a cache all
        tokens are computed in parallel, by the solver at its evaluation settings. With `use_cache=True`, off
        unless asked for, thoughts are computed strictly in sequence, as `generate` does.
        `logits_to_keep` keeps the last logits alone, or those of the given places. The cache is called
        `past_key_values` before transformers 5.24.
        """
        loss_options = {"num_items_in_batch": others.pop("num_items_in_batch", None)}
        _refuse(others)
        if input_ids is None:
            raise ValueError("input_ids: missing")
        cache = past_key_values if cache is None else cache
        if use_cache or cache is not None:
            cache = Cache() if cache is None else cache
            logits_BLV = self._in_sequence(input_ids, attention_mask, cache, logits_to_keep)
        else:
            logits = self._model(input_ids, attention_mask).logits
            logits_BLV = logits[:, _kept(logits_to_keep)]
        loss = None
        if labels is not None:
            vocabulary = self._model.shape.vocab_size
            loss = self.loss_function(logits_BLV, labels, vocab_size=vocabulary, **loss_options)
        output = CausalLMOutputWithPast(loss=loss, logits=logits_BLV, **{CACHE: cache})
        return output if return_dict in (None, True) else output.to_tuple()

    def _in_sequence(
        self, ids_BL: Tensor, attention_mask: Tensor | None, cache: Cache, keep: int | Tensor
    ) -> Tensor:
        """One token after the other; the prompt by the model's own prefill where its last logits will do."""
        if not isinstance(cache, Cache):
            raise ValueError(
                f"past_key_values: must be the cache that this model returned, not {type(cache).__name__}"
            )
        rows, length = ids_BL.shape
        fitting = {(rows, length), (rows, cache.get_seq_length() + length)}
        if attention_mask is not None and (*attention_mask.shape,) not in fitting:
            allowed = " or ".join(map(str, sorted(fitting)))
            raise ValueError(f"attention_mask: has shape {(*attention_mask.shape,)}; must be {allowed}")
        mask_BL = None if attention_mask is None else attention_mask[:, -length:]
        if mask_BL is not None and (cache.slots is None or cache.slots.real_tokens() is None):
            if bool(mask_BL.all()):
                mask_BL = None
            elif cache.slots is not None:
                raise ValueError("attention_mask: padding cannot follow a prompt that had none")
        at, logits = 0, []
        if cache.slots is None:
            at = ids_BL.shape[1] if isinstance(keep, int) and keep == 1 else 1
            logits_BV, cache.slots = self._model.prefill(
                ids_BL[:, :at],
                None if mask_BL is None else mask_BL[:, :at],
                parallel=self.config.parallel_prefill,
            )
            logits.append(logits_BV)
        for here in range(at, ids_BL.shape[1]):
            mask_B1 = None if mask_BL is None else mask_BL[:, here : here + 1]
            logits.append(self._model.step(ids_BL[:, here : here + 1], cache.slots, mask_B1))
        return torch.stack(logits, dim=1)[:, _kept(keep)]

    # ── generate ──────────────────────────────────────────────────────────────────────────────────
    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes its own

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Refuses more: transformers lets every model be given some inputs, such as `position_ids`."""
        super()._validate_model_kwargs(model_kwargs)
        taken = signature(self.prepare_inputs_for_generation).parameters
        _refuse({name: value for name, value in model_kwargs.items() if name not in taken})

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache does not hold yet. `input_ids` may be all tokens or the new ones alone;
        the mask always covers all."""
        whole = attention_mask is None or attention_mask.shape[1] == input_ids.shape[1]
        cache = past_key_values if cache is None else cache
        if cache is not None and whole:
            input_ids = input_ids[:, cache.get_seq_length() :]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            CACHE: cache,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }


def _refuse(inputs: dict[str, Any]) -> None:
    """Raises ValueError for any that says something."""
    if unknown := [name for name, value in inputs.items() if value is not None and value is not False]:
        raise ValueError(f"{', '.join(unknown)}: is not an input of this model")


def _kept(logits_to_keep: int | Tensor) -> Any:
    """The index of the logits to keep; all for 0."""
    return slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
