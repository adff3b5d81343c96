"""Arrow data from files of other people: values only, nothing that Python would have to run."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from tuner.errors import DataError


def check_plain(schema: pa.Schema, path: Path) -> None:
    """Refuse columns whose values are read by code: Ray registers a type with pyarrow that unpickles each value.

    Call it before values are converted, in the process that converts them: a type that nobody registered there is
    read as what it is stored as. Arrow's own extension types (`arrow.uuid`, ...) are values.

    Raises:
        DataError: names the column.
    """
    for index in range(len(schema)):
        field = schema.field(index)
        if (name := _foreign_type(field.type)) is not None:
            raise DataError(
                f"{path}: column `{field.name}` is of the type {name}, whose values may run code when they are read; "
                "save it as text or bytes"
            )


def _foreign_type(kind: pa.DataType) -> str | None:
    """Name of the first extension type written in Python in or below a type."""
    if isinstance(kind, pa.ExtensionType):
        return str(kind.extension_name)
    if isinstance(kind, pa.BaseExtensionType):
        return _foreign_type(kind.storage_type)
    if isinstance(kind, pa.DictionaryType):
        return _foreign_type(kind.value_type)
    nested = (_foreign_type(kind.field(index).type) for index in range(kind.num_fields))
    return next(filter(None, nested), None)
