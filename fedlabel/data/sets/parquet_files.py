"""Reads Parquet files as columns of texts, with pyarrow, an optional dependency."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from fedlabel.data.sets.config import DataError
from fedlabel.data.sets.text_tables import Interner, TextTable, as_list, check_names, quoted
from fedlabel.shown import shown

MAX_CELLS = 2**28
"""A few bytes of Parquet can hold any number of equal cells."""
CHUNK = 2**16
"""So many cells are Python's objects at a time."""


def read_parquet(path: Path, skipped: Collection[str] = ()) -> TextTable:
    """Returns the columns of a Parquet file, except those `skipped`.

    Raises:
        DataError: pyarrow is missing, the file is damaged, or a column holds no numbers or texts.
    """
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet files are read by pyarrow, which is not installed. Install it "
            "(pip install pyarrow), or write the table as CSV."
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            check_names(str(path), schema.names)
            kept = [name for name in schema.names if name not in skipped]
            for name in kept:
                kind = schema.field(name).type
                kind = kind.value_type if types.is_dictionary(kind) else kind
                if types.is_nested(kind) or "binary" in str(kind):
                    raise DataError(
                        f"{path}: column {shown(name)} holds {quoted(str(kind))}, neither numbers nor texts. "
                        "Write it as several columns, or leave it out (of a data set by "
                        f"data.drop_columns={as_list(name)})."
                    )
            if not kept or not rows:
                raise DataError(f"{path} holds no rows. At least one is needed.")
            if rows * len(kept) > MAX_CELLS:
                raise DataError(
                    f"{path} holds {rows:,} rows of {len(kept)} columns, more than {MAX_CELLS:,} cells. Take a part of "
                    "them, or leave columns out by data.drop_columns."
                )
            columns: dict[str, list[str]] = {name: [] for name in kept}
            intern = {name: Interner() for name in kept}
            for batch in file.iter_batches(max(1, CHUNK // len(kept)), columns=kept):
                for name, cells in zip(batch.schema.names, batch.columns, strict=True):
                    columns[name].extend(intern[name](list(map(_text, cells.to_pylist()))))
    except DataError:
        raise
    except (ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{path} cannot be read as a Parquet file: {reason} Write it again.") from error
    return TextTable(str(path), tuple(schema.names), columns)


def _text(cell: object) -> str:
    return "" if cell is None else str(cell).strip()
