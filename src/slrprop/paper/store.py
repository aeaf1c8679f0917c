"""Results row by row in a database, so that a killed run goes on where it stopped."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

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

    @property
    def key(self) -> tuple[str, int, str, int]:
        """What makes a row unique."""
        return self.experiment, self.seed, self.method, self.rank


_TABLE = Table(
    "results",
    MetaData(),
    *(
        Column(name, _TYPES[kind], primary_key=name in ("experiment", "seed", "method", "rank"))
        for name, kind in Result.__annotations__.items()
    ),
)


class Store:
    """Results in a database file; every row is committed as it is added."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 60})
        with self._engine.begin() as connection:
            connection.execute(CreateTable(_TABLE, if_not_exists=True))

    def add(self, result: Result) -> None:
        """Keep a row."""
        with self._engine.begin() as connection:
            connection.execute(insert(_TABLE), asdict(result))

    def results(self, experiment: str | None = None) -> list[Result]:
        """All rows, or those of one experiment, in a fixed order."""
        query = select(_TABLE).order_by(*_TABLE.primary_key.columns)
        if experiment is not None:
            query = query.where(_TABLE.c.experiment == experiment)
        with self._engine.connect() as connection:
            rows = [dict(row._mapping) for row in connection.execute(query)]
        # SQLite keeps NaN as NULL
        return [Result(**{name: math.nan if value is None else value for name, value in row.items()}) for row in rows]  # type: ignore[arg-type]
