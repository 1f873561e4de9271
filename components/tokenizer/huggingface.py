"""A tokenizer of the Hugging Face `tokenizers` library: a file, a folder or a name on the hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lattice.components.tokenizer._codecs import CONFIG, MODEL, FastCodec, load_codec, load_config
from lattice.protocols import Codec, Tokenizer
from lattice.registry import defining, kinds, register

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@register("tokenizer", "huggingface")
@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer(Tokenizer):
    """`tokenizer.json`, from this machine or the Hugging Face hub."""

    name: str
    """Path of a `tokenizer.json`, of a folder that holds one, or a name on the hub (`owner/name`)."""
    eos: str | None = None
    """Token that ends a document; None for the one of `tokenizer_config.json`, else a common name."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name = '': must be a tokenizer.json, a folder with one, or a name on the hub")

    def build(self, folder: Path | None, corpus: Callable[[], Iterator[str]] | None = None) -> Codec:
        local = self._local()
        if folder is not None and (folder / MODEL).is_file():
            saved = self._saved(folder)
            if local is not None and self._load(local).fingerprint != saved.fingerprint:
                raise ValueError(
                    f"name = {self.name!r}: differs from the tokenizer saved in {folder}; go on with the "
                    f"saved one by setting name to {str(folder)!r}, or start in an empty folder"
                )
            return saved
        model = local or self._download()
        codec = self._load(model)
        if folder is not None:
            config = load_config(model.with_name(CONFIG))
            codec.save(folder, {**config, "lattice": {"kind": "huggingface", "name": self.name}})
        return codec

    @property
    def spec(self) -> str:
        return self.name

    @classmethod
    def from_spec(cls, spec: str) -> Tokenizer | None:
        """A path that exists, or a possible hub name that is no kind's name and belongs to no other kind."""
        if cls(name=spec)._local() is not None or spec.endswith(".json"):
            return cls(name=spec)
        others = [other for other in defining("tokenizer", "from_spec").values() if other is not cls]
        if spec in kinds("tokenizer") or any(other.from_spec(spec) is not None for other in others):  # type: ignore[attr-defined]
            return None
        return cls(name=spec) if HUB_NAME.fullmatch(spec) else None

    def _local(self) -> Path | None:
        path = Path(self.name)
        if (path / MODEL).is_file():
            return path / MODEL
        return path if path.is_file() and path.suffix == ".json" else None

    def _load(self, model: Path) -> FastCodec:
        return load_codec(model, load_config(model.with_name(CONFIG)), self.eos)

    def _saved(self, folder: Path) -> FastCodec:
        made: dict[str, Any] = load_config(folder / CONFIG).get("lattice", {})
        mine = {"kind": "huggingface", "name": self.name}
        if self._local() is None and made not in ({}, mine):
            raise ValueError(
                f"name = {self.name!r}: {folder} holds another tokenizer, made with {made}; "
                "start in an empty folder"
            )
        return self._load(folder / MODEL)

    def _download(self) -> Path:
        help_ = (
            f"put its {MODEL} (and {CONFIG}, if it has one) on this machine and name the file or its "
            "folder instead: tokenizer.name in a recipe, --tokenizer of `lattice prepare`"
        )
        if not HUB_NAME.fullmatch(self.name):
            raise FileNotFoundError(
                f"tokenizer {self.name!r}: no {MODEL} there, and it is no name on the hub; {help_}"
            )
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError

        unreachable = self._unreachable()
        cached_only = unreachable is not None
        try:
            model = Path(huggingface_hub.hf_hub_download(self.name, MODEL, local_files_only=cached_only))
        except Exception as failure:  # offline, no such repository, no such file, no permission, …
            error = unreachable or failure
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise FileNotFoundError(
                f"tokenizer {self.name!r}: no such file here, and {MODEL} cannot be had from the Hugging "
                f"Face hub ({type(error).__name__}: {reason}); {help_}"
            ) from error
        with contextlib.suppress(EntryNotFoundError):  # many tokenizers have none; it lands beside the model
            huggingface_hub.hf_hub_download(self.name, CONFIG, local_files_only=cached_only)
        return model

    def _unreachable(self) -> Exception | None:
        """Why the hub does not answer, asked once: a download would go on asking for half a minute."""
        import huggingface_hub

        try:
            huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(self.name, MODEL))
        except Exception as error:
            return error
        return None
