"""What can be asked of llama.cpp's quantizer, known before it starts: it would die, quietly leave a
tensor as it is, or quantize without the importance matrix it was given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from edgedistill.errors import ArtifactError, RuntimeFailure
from edgedistill.gguf_header import FLOATS, QUANTIZED, Header, TensorInfo, read_header, type_for
from edgedistill.importance import read_importance, require_fit

# Types that only make sense with an importance matrix (llama-quant.cpp, tensor_requires_imatrix).
NEED_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})
# The stock format that stands for a type in a file's metadata, where it is not called the same.
STOCK = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
PLAIN = frozenset(
    {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q6_K", "IQ4_NL", "IQ4_XS", *STOCK}
)


def named_by(types: Mapping[str, str]) -> str:
    """The stock format by which a file of these types of matrices is called in its metadata
    (general.file_type, which programs show): that of the commonest."""
    ((kind, _),) = Counter(types.values()).most_common(1)
    return STOCK.get(kind, kind) if kind in PLAIN else "Q8_0"


def check_request(
    source: Path, format: str, importance: Path | None, types: Mapping[str, str]
) -> None:
    """Refuse what cannot be done.

    Raises:
        ArtifactError: the source is damaged or quantized already, or the importance matrix is
            damaged or another model's.
        RuntimeFailure: a type or a tensor that is not there, or a type that needs a matrix.
    """
    model = read_header(source)
    for tensor in model.tensors:
        if tensor.type in QUANTIZED:
            raise ArtifactError(
                f"this file is quantized already: tensor {tensor.name} is {tensor.type}",
                where=str(source),
                hint="quantize the F16 or F32 file it was made from; twice loses twice",
            )
    weighed: frozenset[str] = frozenset()
    if importance is not None:
        found = read_importance(importance)
        require_fit(found, importance, model)
        weighed = frozenset(found.sums)
    if types and format in FLOATS:
        # llama.cpp reads the list only for quantized formats.
        raise _refused(source, f"types for single tensors cannot be given with format {format}")
    tensors = {tensor.name: tensor for tensor in model.tensors}
    for name, type in types.items():
        _check_type(source, tensors.get(name), name, type, name in weighed)


def check_written(written: Header, types: Mapping[str, str], source: Path) -> None:
    """Prove that each tensor of `types` has become what was asked for, or its known fallback.

    Raises:
        RuntimeFailure: llama.cpp made something else, as it does of norms and of 1-D tensors.
    """
    for tensor in written.tensors:
        if tensor.name in types:
            wanted = type_for(types[tensor.name], tensor.columns)
            if tensor.type != wanted:
                raise _refused(
                    source,
                    f"tensor {tensor.name} should become {wanted}, llama.cpp made {tensor.type}",
                )


def _check_type(
    source: Path, tensor: TensorInfo | None, name: str, type: str, weighed: bool
) -> None:
    if type not in (*FLOATS, *QUANTIZED):
        known = ", ".join((*FLOATS, *QUANTIZED))
        raise _refused(source, f"llama.cpp has no type {type!r} for {name}; it has {known}")
    if tensor is None:
        raise _refused(source, f"there is no tensor {name!r} that could become {type}")
    made = type_for(type, tensor.columns)
    if made is None:
        raise _refused(source, f"{name} has rows of {tensor.columns} values: too odd for {type}")
    if made in NEED_IMPORTANCE and not weighed:
        raise _refused(source, f"{name} cannot become {made} without an importance matrix for it")


def _refused(source: Path, what: str) -> RuntimeFailure:
    return RuntimeFailure(what, where=str(source), hint="ask for another type, or none for it")
