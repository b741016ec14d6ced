"""Loading of LLaVA checkpoints, in Hugging Face's or the original format, as stock transformers models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BackendError, CheckpointError, InputError, dtype_name
from . import files as checkpoint_files
from . import original_llava
from .attention import Attention, resolve_attention
from .config_sizes import head_width, tower_grid
from .files import as_checkpoint_error, check_sizes, locate, read_json, refuse_outer, refuse_part
from .weights import HUGGING_FACE_NAMES, load_weights, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
TOWERS = ("clip_vision_model", "siglip_vision_model")
# Entries that every config has, some under other names too.
_SIZES = ("num_hidden_layers", "num_attention_heads")
# A Hugging Face tokenizer needs one of these files.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")

# Of the entry "sfllava_fast" of config.json, all of them texts but the first.
_OPTIONS = ("frames", "layout", "prompt", "caveat", "choices")
_WIDEST_GRID = 1024

# SlowFast-LLaVA's published runs scale the 4096 positions of Llama models by dynamic NTK scaling with factor 2, which
# changes nothing up to 4096 tokens.
_STRETCHED_POSITIONS = 4096
_STRETCH = {"rope_type": "dynamic", "factor": 2.0}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        name: The path or hub id that the caller gave.
        model: The stock model. Its vision tower ends after the last layer whose features are read.
        tokenizer: The tokenizer.
        chat_template: The chat template, or None.
        preprocessor: The image processor's config.
        attention: The attention that the model was loaded with.
        depths: Number of encoder layers before each feature that is read, as in `hidden_states[depth]`.
        drops_first: Whether the first vision token (CLS) is dropped.
        grid: (rows, columns) of a frame's patches.
        context: Maximum number of tokens of the language model.
        options: The "sfllava_fast" entry of config.json, or None.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    preprocessor: dict[str, Any]
    attention: Attention
    depths: tuple[int, ...]
    drops_first: bool
    grid: tuple[int, int]
    context: int
    options: dict[str, Any] | None


def load_checkpoint(
    path_or_hub_id: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attention: str = "auto",
) -> Checkpoint:
    """Load a LLaVA-1.5 or LLaVA-NeXT checkpoint, in Hugging Face's format (transformers 4 or 5) or the original one.

    Every weight is read from the files; no weight is missing, left over or random.

    Args:
        path_or_hub_id: A directory, or a hub id such as owner/name.
        dtype: As in `choose_dtype`.
        device: As in `choose_device`.
        attention: As in `resolve_attention`.

    Raises:
        CheckpointError: If the checkpoint is missing, corrupt, incomplete or of another architecture.
        BackendError: If the device, dtype or attention is not supported.
        InputError: If the dtype is unknown.
    """
    require_transformers()
    path = locate(path_or_hub_id)
    refuse_part(path)
    raw = read_config(path)
    on = choose_device(device)
    of_dtype = choose_dtype(dtype, on, raw)
    config = stock_config(path, raw)
    depths = feature_depths(config.vision_feature_layer, config.vision_config.num_hidden_layers)
    text = config.text_config
    with as_checkpoint_error(f"{path}: config.json is not usable"):
        width, context = head_width(text), stretch_context(text)
    chosen = resolve_attention(attention, on, of_dtype, width)
    tokenizer = load_tokenizer(path, raw)
    preprocessor = read_preprocessor(path, raw)
    model = load_model(path, raw, config, of_dtype, on, chosen.implementation, max(depths))
    drops_first = config.vision_feature_select_strategy == "default"
    return Checkpoint(
        str(path_or_hub_id),
        model,
        tokenizer,
        read_chat_template(path, tokenizer),
        preprocessor,
        chosen,
        depths,
        drops_first,
        patch_grid(model.model.vision_tower, config.vision_config, drops_first),
        context,
        raw.get("sfllava_fast"),
    )


def require_transformers() -> None:
    """Raise BackendError unless transformers 5 or later can be imported."""
    try:
        from transformers import __version__
    except ImportError as error:
        raise BackendError(f"no usable transformers ({error}): pip install 'transformers>=5.17'") from error
    if int(__version__.split(".")[0]) < 5:
        raise BackendError(f"transformers {__version__} is too old: pip install 'transformers>=5.17'")


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a LLaVA-1.5 or LLaVA-NeXT checkpoint. Raises CheckpointError for any other."""
    config = checkpoint_files.read_config(path)
    if config is None:
        refuse_part(path)
        refuse_outer(path)
        raise CheckpointError(f"{path} has no config.json: give the directory of a LLaVA checkpoint")
    with as_checkpoint_error(f"{path}: config.json is not usable"):
        _check_config(path, config)
    return config


def _check_config(path: Path, config: dict[str, Any]) -> None:
    model_type = str(config.get("model_type"))
    found = (config.get("architectures") or [CLASSES.get(model_type, config.get("model_type"))])[0]
    if not original_llava.is_original(config) and (found is None or found != CLASSES.get(model_type)):
        readable = ", ".join([*CLASSES.values(), *original_llava.ARCHITECTURES])
        raise CheckpointError(f"{path} holds {found}: only {readable} can be read")
    if config.get("quantization_config"):
        raise CheckpointError(f"{path} is quantized, which is not supported: use the checkpoint that it was made from")
    options = config.get("sfllava_fast")
    if options is not None and not isinstance(options, dict):
        raise ValueError("its entry sfllava_fast is no object")
    for name, value in (options or {}).items():
        valid = isinstance(value, int) and value >= 1 if name == "frames" else isinstance(value, str)
        if name in _OPTIONS and not valid:
            raise ValueError(f"its entry sfllava_fast has {name} {value!r}")


def stock_config(path: Path, raw: dict[str, Any]) -> PreTrainedConfig:
    """The config of the stock model.

    Raises:
        CheckpointError: If the vision tower or the language model is not supported, or has too many layers.
    """
    if original_llava.is_original(raw):
        return original_llava.stock_config(path, raw)
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    with as_checkpoint_error(f"{path}: config.json is not usable"):
        config = AutoConfig.from_pretrained(path)
        tower, text = config.vision_config, config.text_config
        if tower.model_type not in TOWERS:
            raise CheckpointError(
                f"{path} has the vision tower {tower.model_type}, not {' or '.join(TOWERS)}: use a CLIP LLaVA"
            )
        if text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or text.get_text_config() is not text:
            raise CheckpointError(
                f"{path} has the language model {text.model_type}, which is not a decoder: use vicuna, mistral, Yi or "
                "Qwen2"
            )
        for part in (tower, text):
            check_sizes(path / "config.json", {name: getattr(part, name) for name in _SIZES})
    return config


def config_grid(path: Path, raw: dict[str, Any]) -> tuple[int, int]:
    """(rows, columns) of a frame's patches, from config.json only."""
    original = original_llava.is_original(raw)
    vision = original_llava.tower_config(path, raw) if original else raw.get("vision_config") or {}
    with as_checkpoint_error(f"{path}: config.json is not usable"):
        side = vision.get("image_size", 336) // vision.get("patch_size", 14)
        if not 1 <= side <= _WIDEST_GRID:
            raise ValueError(f"its pictures are {side} patches wide")
    return side, side


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device to run on: by default the GPU if there is one, else the CPU. Raises BackendError for any other."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"unknown device {device!r}: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"device {device.type} is not supported: use cpu or cuda")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise BackendError(f"device {device} does not exist ({count} CUDA devices are visible): use cpu")
    return device


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device, config: dict[str, Any]) -> torch.dtype:
    """The dtype to load the model in.

    Args:
        dtype: A torch dtype or a name in DTYPES. None stands for float32 on a CPU, and on a GPU for the checkpoint's
            own, or bfloat16 if that is float32.
        device: Of the model.
        config: The checkpoint's config.json.

    Raises:
        InputError: If the dtype is unknown.
        BackendError: If it is float16 on a CPU.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if dtype is None:
        stored = DTYPES.get(dtype_name(config.get("dtype") or config.get("torch_dtype")), torch.float32)
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if stored is torch.float32 else stored
    if dtype not in DTYPES.values():
        raise InputError(f"dtype {dtype} is not supported: use float32, bfloat16 or float16")
    if dtype is torch.float16 and device.type == "cpu":
        raise BackendError("float16 matrix products are unusably slow on a CPU: use bfloat16 or float32")
    return dtype


def feature_depths(layers: int | list[int], count: int) -> tuple[int, ...]:
    """Number of encoder layers before each feature in `vision_feature_layer`, of a tower of `count` layers.

    Entry i means `hidden_states[i]` of the stock tower, which has count + 1 states, the first before any layer.
    """
    named = layers if isinstance(layers, list) else [layers]
    if not named or not all(isinstance(i, int) and -count - 1 <= i <= count for i in named):
        raise CheckpointError(f"vision_feature_layer {layers} is outside of a vision tower of {count} layers")
    return tuple(i if i >= 0 else count + 1 + i for i in named)


def load_model(
    path: Path,
    raw: dict[str, Any],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    attention: str,
    depth: int | None = None,
) -> PreTrainedModel:
    """The stock model in evaluation mode, with weights from the checkpoint's files.

    Args:
        path: The checkpoint's directory.
        raw: Its config.json.
        config: The stock model's config.
        dtype: Of the weights.
        device: Of the weights.
        attention: The attention's name in transformers.
        depth: Number of the vision tower's layers to keep; None keeps all, and the post-norm.

    Raises:
        CheckpointError: As in `load_weights`.
    """
    import transformers

    original = original_llava.is_original(raw)
    stored = original_llava.tensors(path, raw) if original else stored_tensors(path, HUGGING_FACE_NAMES)
    with as_checkpoint_error(f"{path}: config.json is not usable"), torch.device("meta"):
        stock = getattr(transformers, CLASSES[config.model_type])
        model = stock._from_config(config, dtype=dtype, attn_implementation=attention)
    if depth is not None:
        cut_tower(model.model.vision_tower, depth)
    load_weights(model, stored, path, config.vision_config.num_hidden_layers, device)
    if (path / "generation_config.json").is_file():
        with as_checkpoint_error(f"{path / 'generation_config.json'} is not usable"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model.requires_grad_(False).eval()


def cut_tower(tower: torch.nn.Module, depth: int) -> None:
    """Remove the layers after `depth` and the post-norm from a vision tower, in place."""
    core = _core(tower)
    layers = getattr(getattr(core, "encoder", None), "layers", None)
    if layers is None or not hasattr(core, "post_layernorm"):
        raise CheckpointError(f"the vision tower {type(tower).__name__} is not like CLIP's: use a CLIP LLaVA")
    core.encoder.layers = layers[:depth]
    core.post_layernorm = torch.nn.Identity()


def _core(tower: torch.nn.Module) -> Any:
    # transformers 5.0 has the level .vision_model, later releases do not.
    return getattr(tower, "vision_model", tower)


def patch_grid(tower: torch.nn.Module, config: Any, drops_first: bool) -> tuple[int, int]:
    """(rows, columns) of a frame's patches. Raises CheckpointError if the tower's features have another number."""
    rows, columns = tower_grid(config)
    extra = int(hasattr(_core(tower).embeddings, "class_embedding")) - int(drops_first)
    if extra:
        chosen, other = ("default", "full") if drops_first else ("full", "default")
        raise CheckpointError(
            f"vision_feature_select_strategy {chosen!r} leaves {rows * columns + extra} vision tokens, "
            f"not the {rows}x{columns} grid that is pooled: set it to {other!r} in config.json"
        )
    return rows, columns


def load_tokenizer(path: Path, raw: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory."""
    from transformers import AutoTokenizer

    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(f"{path} has no tokenizer ({', '.join(_TOKENIZERS)}): download the checkpoint again")
    kind = original_llava.tokenizer_class(path) if original_llava.is_original(raw) else AutoTokenizer
    with as_checkpoint_error(f"{path}: the tokenizer cannot be loaded"):
        return kind.from_pretrained(path)


def read_chat_template(path: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A checkpoint's chat template: the processor's (chat_template.json), else the tokenizer's, or None."""
    template = (read_json(path / "chat_template.json") or {}).get("chat_template") or tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def read_preprocessor(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The image processor's config: preprocessor_config.json, or the entry in processor_config.json.

    In the original format it is the vision tower's.
    """
    if original_llava.is_original(raw):
        return original_llava.tower_preprocessor(path, raw)
    settings = read_json(path / "preprocessor_config.json")
    settings = settings or (read_json(path / "processor_config.json") or {}).get("image_processor")
    if not settings:
        raise CheckpointError(f"{path} has no preprocessor_config.json: download the checkpoint again")
    return settings


def rope_type(text: Any) -> str:
    """The type of rotary embedding in a language model's config."""
    return (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")


def stretch_context(text: Any) -> int:
    """Maximum number of tokens of the language model. Scales its rotary embedding in place, as published."""
    fits = text.model_type == "llama" and text.max_position_embeddings == _STRETCHED_POSITIONS
    if fits and rope_type(text) == "default":
        text.rope_parameters = {**text.rope_parameters, **_STRETCH}
    # In other types of scaling, max_position_embeddings includes the factor.
    factor = text.rope_parameters.get("factor", 1.0) if rope_type(text) in ("linear", "dynamic") else 1.0
    return int(text.max_position_embeddings * factor)
