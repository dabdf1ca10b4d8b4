"""Make any outcome storable as JSON, and read it back.

JSON knows neither NaN nor arrays, and PostgreSQL's text knows no NUL, so:

* NaN and infinities become `{"float": "nan" | "inf" | "-inf"}`;
* control characters and lone surrogates in text are escaped as `\\xNN` / `\\uNNNN`, text above 64 KiB is cut and
  says so;
* a numeric array becomes `{"array": reference, "dtype": ..., "shape": [...]}`, kept as an artifact (.npy) above 64 KiB,
  else `{"array": base64 of its bytes in C order, "dtype": ..., "shape": [...]}`.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from netassay.heavy import np
from netassay.store import artifacts

INLINE_ARRAY_BYTES = 64 * 1024
TEXT_LIMIT = 64 * 1024

_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Unstorable(ValueError):
    """A value that no rule here covers; the message names the field and its type."""


def text(value: str, limit: int = TEXT_LIMIT) -> str:
    """Text that every database takes: escaped, and cut in the middle above `limit` characters."""
    if len(value) > limit:
        half = limit // 2
        value = f"{value[:half]}\n... {len(value) - 2 * half} characters cut ...\n{value[-half:]}"
    if _UNSAFE.search(value):
        value = _UNSAFE.sub(_escape, value)
    return value


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def dump(fields: Mapping[str, Any] | BaseModel) -> str:
    """JSON text of a result or of its fields. Raises Unstorable naming the field."""
    return json.dumps(_plain(fields, ""), separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def _plain(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, str):
        return text(value)
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {text(str(name)): _plain(item, f"{path}.{name}".lstrip(".")) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}.{place}") for place, item in enumerate(value)]
    if hasattr(value, "__array__") and hasattr(value, "dtype"):
        return _dump_array(np.asarray(value), path)
    raise Unstorable(
        f"{path or 'the result'} holds a {type(value).__name__}, which cannot be stored; "
        "return plain numbers, text or arrays"
    )


def _dump_array(array: Any, path: str) -> Any:
    if array.dtype.kind not in "biufc":
        raise Unstorable(f"{path} is an array of {array.dtype}; only numeric and boolean arrays can be stored")
    if array.ndim == 0:
        return _plain(array.item(), path)
    array = np.ascontiguousarray(array)
    about = {"dtype": array.dtype.str, "shape": list(array.shape)}
    if array.nbytes <= INLINE_ARRAY_BYTES:
        return {"array": base64.b64encode(array.tobytes()).decode(), **about}
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return {"array": f"array:{artifacts.current().put(buffer.getvalue())}", **about}


def load(json_text: str) -> dict[str, Any]:
    """Fields of a stored result: NaN and infinities are floats again; arrays stay as stored (see `load_array`)."""
    # The hook makes reading three times slower, and few results need it.
    return json.loads(json_text, object_hook=_special) if '"float"' in json_text else parse(json_text)


_decode = json.JSONDecoder().raw_decode


def parse(json_text: str) -> Any:
    """JSON as we wrote it, without blanks around: twice as fast as `json.loads`, which millions of records feel."""
    return _decode(json_text)[0]


def _special(value: dict[str, Any]) -> Any:
    if len(value) == 1 and "float" in value:
        return _SPECIAL.get(value["float"], value)
    return value


def is_array(value: Any) -> bool:
    return isinstance(value, dict) and "array" in value and "dtype" in value


def load_array(stored: Any) -> Any:
    """The numpy array of a stored value (also of a plain list or number)."""
    if not is_array(stored):
        return np.asarray(stored)
    if stored["array"].startswith("array:"):
        return np.load(artifacts.current().path(stored["array"]), allow_pickle=False)
    data = np.frombuffer(base64.b64decode(stored["array"]), dtype=stored["dtype"])
    return data.reshape(stored["shape"]).copy()
