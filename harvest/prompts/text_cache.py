"""Encoded prompts on the disk, so that the text encoders can be freed before the transformer loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from harvest.atomic import whole_file
from harvest.models import LoadedModel
from harvest.store import Location, first_line

_NAMES = ("prompt_embeds", "pooled_prompt_embeds")


class TextCache:
    """A folder beside the store, with a file for each shard that is still to be made.

    Args:
        place: where the store lies; for a URL the cache is in the working directory.
        fingerprint: the store's; files of another store are not used.
    """

    def __init__(self, place: Location, fingerprint: str) -> None:
        """Choose the folder; nothing is created yet."""
        beside = place.path or Path(str(place).rpartition("/")[2])
        self.folder = beside.with_name(f".{beside.name}.text")
        self._fingerprint = fingerprint

    def fill(
        self,
        model: LoadedModel,
        prompts: Mapping[int, Sequence[str]],
        *,
        batch: int,
        max_sequence_length: int,
    ) -> None:
        """Encode the prompts of the shards that have no file yet, in the batches of the harvest.

        Args:
            model: a model with its text encoders.
            prompts: shard -> its prompts.
            batch: prompts that are encoded together, as many as images are made together.
            max_sequence_length: length of the text in T5 tokens.

        Raises:
            OSError: they cannot be written, for instance because the disk is full.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [shard for shard in prompts if not self._valid(shard)]
        for shard in tqdm(missing, desc="text", unit="shard"):
            texts = prompts[shard]
            parts = [
                model.encode(texts[first : first + batch], max_sequence_length)
                for first in range(0, len(texts), batch)
            ]
            whole = {name: torch.cat([part[name].cpu() for part in parts]) for name in _NAMES}
            try:
                with whole_file(self._file(shard)) as draft:
                    save_file(whole, draft, {"fingerprint": self._fingerprint})
            except (OSError, SafetensorError) as error:
                raise OSError(
                    f"encoded prompts could not be written to {self.folder}: {first_line(error)}; "
                    "make room, and run the same command again: what was finished is kept"
                ) from error

    def read(self, shard: int) -> dict[str, torch.Tensor]:
        """The encoded prompts of a shard, as `LoadedModel.encode` gives them, on the CPU."""
        with safe_open(self._file(shard), framework="pt") as file:
            # Copied: matrix products may round differently on memory that the file's layout left unaligned.
            return {name: file.get_tensor(name).clone() for name in _NAMES}

    def drop(self, shard: int) -> None:
        """Remove a shard's file, once the shard is in the store."""
        self._file(shard).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder if nothing is left in it."""
        if self.folder.is_dir() and not any(self.folder.glob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _valid(self, shard: int) -> bool:
        try:
            with safe_open(self._file(shard), framework="pt") as file:
                return (file.metadata() or {}).get("fingerprint") == self._fingerprint
        except (OSError, SafetensorError):
            return False

    def _file(self, shard: int) -> Path:
        return self.folder / f"{shard}.safetensors"
