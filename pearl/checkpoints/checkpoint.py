"""One model where it lies: a hub id, a folder or a GGUF file, described without its weights, and loaded with them.

Knows: transformers' loaders and what goes wrong in them. Refuses to know: targets, drafters, and what is done with one.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from pearl.checkpoints import embedded, hub, quantized, shared_embeddings, text_part
from pearl.checkpoints.placement import Placement
from pearl.checkpoints.quiet import quiet
from pearl.config.engine_config import EMBEDDED, EngineConfig, model_path
from pearl.config.inputs import brief
from pearl.config.pairs import BYTES, known_numbers
from pearl.config.weight_files import numbers_of_gguf, numbers_of_safetensors
from pearl.core.token_buckets import LEAST_CONTEXT
from pearl.errors import CheckpointError, UsageError
from pearl.models.architecture import longest_sequence
from pearl.models.tensor_parallel import model as tensor_parallel

_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")  # of a split file


@dataclass(frozen=True)
class Checkpoint:
    """What `from_pretrained` takes."""

    name: str
    gguf_file: str | None = None
    only_downloaded: bool = False  # no hub answers

    @staticmethod
    def of(name: str) -> Checkpoint:
        """Where the model of that name is; no hub is asked."""
        if name == EMBEDDED:
            return Checkpoint(str(embedded.folder()))
        path = model_path(name)
        if path.is_dir() and not (path / "config.json").exists():
            path = sorted(path.glob("*.gguf"))[0]  # `check_model` has seen one
        if path.is_file():
            return Checkpoint(str(path.parent), path.name)
        return Checkpoint(str(path) if path.exists() else name)

    def found(self, role: str) -> Checkpoint:
        """Itself, or what was downloaded of it where no hub answers. Raises `UsageError` if it is neither."""
        if Path(self.name).is_dir():
            return self
        return replace(self, only_downloaded=hub.only_downloaded(role, self.name))

    def arguments(self, config: EngineConfig) -> dict[str, Any]:
        """Keyword arguments of transformers' loaders."""
        made: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
        if self.gguf_file:
            made["gguf_file"] = self.gguf_file
        if self.only_downloaded:
            made["local_files_only"] = True
        return made

    def describe(
        self, role: str, config: EngineConfig, own_tokenizer: bool = True
    ) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase | None]:
        """The config and, if the model has its own, the tokenizer. Raises `UsageError`."""
        if self.gguf_file and (part := _PART.search(self.gguf_file)) and int(part[1]) > 1:
            raise UsageError(
                f"The {role} {self.gguf_file} is one of {int(part[1])} parts of a GGUF file: merge them first "
                "(llama-gguf-split --merge FIRST_PART OUTPUT)."
            )
        arguments = self.arguments(config)
        try:
            found = AutoConfig.from_pretrained(self.name, **arguments)
            tokenizer = AutoTokenizer.from_pretrained(self.name, **arguments) if own_tokenizer else None
        except Exception as error:  # transformers raises many kinds for one thing: this is no model it can load
            raise UsageError(
                f"The {role} {self.name} can't be read: give a hub id that this machine can reach, a folder or a GGUF "
                f"file ({type(error).__name__}: {brief(error, 300)})."
            ) from error
        found = text_part.config_of(self.name, found)
        longest_sequence(found)
        context = getattr(found.get_text_config(), "max_position_embeddings", None) or LEAST_CONTEXT
        if role == "target" and context < LEAST_CONTEXT:
            raise UsageError(
                f"The target {self.name} reads {context} tokens, and its forwards are compared at start on texts of "
                f"{LEAST_CONTEXT}: choose a model with a longer context."
            )
        quantized.check(role, self.name, found, config.load_in if role == "target" else config.draft_load_in)
        return found, tokenizer

    def numbers(self, kind: str = "bfloat16") -> float | None:
        """As how many numbers of a kind the weights count: as the registry of pairs knows, or by the headers of local
        files, without towers."""
        if self.gguf_file:
            return numbers_of_gguf(Path(self.name, self.gguf_file))
        if not Path(self.name).is_dir() and (known := known_numbers(self.name)):
            return known
        with contextlib.suppress(HFValidationError):
            weights = [file for file in self.files() if file.match("model*.safetensors")]
            return sum(numbers_of_safetensors(file, BYTES[kind], text_part.TOWERS) for file in weights) or None
        return None

    def files(self) -> list[Path]:
        """The local files of weights, and of code that comes with them."""
        folder = Path(self.name)
        if not folder.is_dir():
            described = try_to_load_from_cache(self.name, "config.json")
            folder = Path(described).parent if isinstance(described, str) else folder
        weights = folder.glob(self.gguf_file or "*.safetensors")
        return sorted([*weights, *folder.glob("*.py")])

    def load(
        self,
        config: EngineConfig,
        dtype: str,
        load_in: str | None,
        placed: Placement,
        architecture: PreTrainedConfig | None = None,
        ranks: int = 1,
    ) -> Any:
        """The model with its weights. `architecture`: a config to load by, instead of the checkpoint's own. `ranks`:
        this is one of them, with a shard. Raises `CheckpointError`."""
        where = {"device_map": placed.device_map()} if ranks == 1 else tensor_parallel.sharding(ranks)
        arguments = {**self.arguments(config), "dtype": getattr(torch, dtype), **where}
        if not self.gguf_file:
            whole = AutoConfig.from_pretrained(self.name, **self.arguments(config))
            if (part := text_part.config_of(self.name, whole)) is not whole:
                arguments |= {"config": part, "key_mapping": text_part.NAMES}
        if architecture is not None:  # of what layers left out would read there may be tables, which shrink to nothing
            arguments |= {"config": architecture, "ignore_mismatched_sizes": True}
        if memory := placed.max_memory():
            arguments["max_memory"] = memory
        if load_in:
            arguments["quantization_config"] = quantized.settings(load_in, dtype, config.double_quant)
        if not self.gguf_file:
            arguments["use_safetensors"] = True  # a pickle may run whatever its maker likes
        try:
            with quiet():
                loaded: Any = AutoModelForCausalLM.from_pretrained(self.name, output_loading_info=True, **arguments)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # a file that is missing, cut short, of other shapes, or a pickle: each in its way
            raise CheckpointError(
                f"The weights of {self.name} can't be loaded: they must be whole, of the shapes that its config.json "
                f"says, and safetensors, as pickles are refused ({type(error).__name__}: {brief(error, 300)})."
            ) from error
        model, found = loaded
        unfit = {key for key, *_ in found["mismatched_keys"] if model.get_parameter(key).numel()}
        lacking = unfit.union(found["missing_keys"])
        if lacking and shared_embeddings.read(self.name) is None:
            some = ", ".join(sorted(lacking)[:3])
            raise CheckpointError(
                f"The weights of {self.name} lack {len(lacking)} tensors (such as {some}), which would "
                "be random numbers: get the whole checkpoint again."
            )
        model.eval()
        quantized.make_rows_independent(model)
        if placed.on_cpu:
            quantized.keep_odd_shapes(model)
        return embedded.plain_weights(model) if self.gguf_file else model

    def load_embeddings_and_head(self, config: EngineConfig, dtype: str, placed: Placement) -> Any:
        """The model without its layers: embedding, final norm and head."""
        bare = text_part.config_of(self.name, AutoConfig.from_pretrained(self.name, **self.arguments(config)))
        bare.num_hidden_layers = 0
        if getattr(bare, "layer_types", None):
            bare.layer_types = []
        return self.load(config, dtype, None, placed, bare)
