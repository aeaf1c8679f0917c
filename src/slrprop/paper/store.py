"""Results row by row in a database, so that a killed run goes on where it stopped."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sqlalchemy import Column, Float, Integer, MetaData, String, Table, create_engine, insert, select
from sqlalchemy.schema import CreateTable

_TYPES = {str: String, int: Integer, float: Float}


@dataclass(frozen=True)
class Result:
    """One measured network. ``method`` says the criterion too; metrics in percent on the test set.

    ``compression_rate`` is of the layer before the FRL, ``numbers`` of the whole network, ``seconds`` to plan.
    """

    experiment: str
    seed: int
    method: str
    rank: int
    accuracy: float
    auc: float
    recall: float
    precision: float
    specificity: float
    compression_rate: float
    numbers: int
    bytes: int
    seconds: float


Row = TypeVar("Row")


class Store(Generic[Row]):
    """Rows of one dataclass in a database file; every row is committed as it is added.

    Args:
        path: the SQLite file; made if it is missing.
        kind: the dataclass of the rows; its fields are str, int or float.
        keys: the fields that make a row unique, the experiment's name first.
    """

    def __init__(self, path: Path, kind: type[Row], keys: tuple[str, ...]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._kind, self._keys = kind, keys
        columns: list[Any] = [
            Column(name, _TYPES[of], primary_key=name in keys) for name, of in kind.__annotations__.items()
        ]
        self._table = Table(f"{kind.__name__.lower()}s", MetaData(), *columns)
        self._engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 60})
        with self._engine.begin() as connection:
            connection.execute(CreateTable(self._table, if_not_exists=True))

    def key(self, row: Row) -> tuple[Any, ...]:
        """What makes a row unique."""
        return tuple(getattr(row, name) for name in self._keys)

    def add(self, row: Row) -> None:
        """Keep a row."""
        with self._engine.begin() as connection:
            connection.execute(insert(self._table), vars(row))

    def results(self, experiment: str | None = None) -> list[Row]:
        """All rows, or those of one experiment, in a fixed order."""
        query = select(self._table).order_by(*self._table.primary_key.columns)
        if experiment is not None:
            query = query.where(self._table.c[self._keys[0]] == experiment)
        with self._engine.connect() as connection:
            rows = [dict(found._mapping) for found in connection.execute(query)]
        # SQLite keeps NaN as NULL
        return [
            self._kind(**{name: math.nan if value is None else value for name, value in row.items()}) for row in rows
        ]


def paper_store(path: Path) -> Store[Result]:
    """The rows of the article's sweep."""
    return Store(path, Result, ("experiment", "seed", "method", "rank"))
