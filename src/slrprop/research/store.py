"""Results row by row in a database, so that a killed run goes on where it stopped. Many may write at once."""

import contextlib
import csv
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from sqlalchemy import URL, BigInteger, Column, Float, MetaData, String, Table, create_engine, make_url, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError
from sqlalchemy.schema import CreateTable

from slrprop.checks import need_extra
from slrprop.errors import SlrpropError, first_line
from slrprop.files import made_folder
from slrprop.research import require_seen

_TYPES = {str: String, int: BigInteger, float: Float}
TIMEOUT = 60  # seconds to wait for another writer of a file
SAME = 1e-4  # relative, between two measurements of one network: one image in 10 000


Row = TypeVar("Row")


class Store(Generic[Row]):
    """Rows of one dataclass in a database; every row is committed as it is added, one that is there already stays.

    Pickled, it is opened anew. Processes of one machine may share a file; several machines need PostgreSQL.

    Args:
        place: a PostgreSQL database by its URL (``postgresql://user:password@host/name``), or the path of an SQLite file,
            made if it is missing.
        kind: the dataclass of the rows; its fields are str, int or float.
        keys: the fields that make a row unique, the experiment's name first.

    Raises:
        SlrpropError: an URL of another kind, PostgreSQL's driver is not installed, or the database can't be opened.
    """

    def __init__(self, place: Path | str, kind: type[Row], keys: tuple[str, ...]) -> None:
        self._kind, self._keys, self.name = kind, keys, str(place)
        if "://" in self.name:
            url = _postgresql(self.name)
            self.name = url.set(drivername="postgresql", query={}).render_as_string(hide_password=True)
            self._place: Path | str = url.render_as_string(hide_password=False)
            self._insert: Any = postgresql.insert
            self._engine = create_engine(url, pool_pre_ping=True)
        else:
            self._place, self._insert = Path(place).absolute(), sqlite.insert
            made_folder(self._place.parent)
            self._engine = create_engine(
                URL.create("sqlite", database=str(self._place)), connect_args={"timeout": TIMEOUT}
            )
        columns: list[Any] = [
            Column(name, _TYPES[of], primary_key=name in keys) for name, of in kind.__annotations__.items()
        ]
        self._table = Table(f"{kind.__name__.lower()}s", MetaData(), *columns)
        with (
            contextlib.suppress(IntegrityError),
            self._connected("be opened") as connection,
        ):  # PostgreSQL: made meanwhile
            if self._insert is sqlite.insert:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            connection.execute(CreateTable(self._table, if_not_exists=True))

    @contextlib.contextmanager
    def _connected(self, what: str) -> Iterator[Connection]:
        """A transaction; where it fails, the sentence says what can't be done and tells no password."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            raise SlrpropError(
                f"the database '{self.name}' can't {what}: {first_line(error)}; name another one"
            ) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened_again, (self._place, self._kind, self._keys)

    def key(self, row: Row) -> tuple[Any, ...]:
        """What makes a row unique."""
        return tuple(getattr(row, name) for name in self._keys)

    def add(self, row: Row) -> None:
        """Keep a row, unless one of its key is there."""
        with self._connected("take a row") as connection:
            connection.execute(self._insert(self._table).on_conflict_do_nothing(), vars(row))

    def take_in(self, path: Path, experiment: str) -> None:
        """Keep the experiment's rows of a CSV file that :func:`slrprop.research.tables.write_csv` wrote, unless they are there.

        Raises:
            SlrpropError: the file can't be read, or it is not such a file.
        """
        types = self._kind.__annotations__
        try:
            with open(path, newline="") as file:
                rows = [row for row in csv.DictReader(file) if row.get(self._keys[0]) == experiment]
            made = [self._kind(**{name: types[name](value) for name, value in row.items()}) for row in rows]
        except (OSError, UnicodeDecodeError) as error:
            raise SlrpropError(f"--rows '{path}' can't be read: {first_line(error)}") from error
        except (csv.Error, KeyError, TypeError, ValueError) as error:
            raise SlrpropError(
                f"--rows '{path}' is not a file of rows ({first_line(error)}); it must have the columns {','.join(types)}"
            ) from error
        if not made:
            raise SlrpropError(f"--rows '{path}' has no rows of {experiment}; name the CSV file that --output wrote")
        for row in made:
            self.add(row)

    def require_same(self, row: Row, *names: str) -> None:
        """Refuse to go on from rows of another network: a row of this key, where there is one, must have measured the same.

        Raises:
            SlrpropError: one of the fields ``names`` differs by more than one image in 10 000.
        """
        keys = self._table.primary_key.columns
        query = select(*(self._table.c[name] for name in names)).where(*(key == getattr(row, key.name) for key in keys))
        with self._connected("be read") as connection:
            before = connection.execute(query).first()
        for name, known in zip(names, before or (), strict=False):
            if known is not None and not math.isclose(known, getattr(row, name), rel_tol=SAME):
                raise SlrpropError(
                    f"the rows of {' '.join(map(str, self.key(row)[:2]))} in '{self.name}' are of another network than the one trained here: "
                    f"its {name} was {known:.6g} and is {getattr(row, name):.6g}; name another --run-dir or --database"
                )

    def results(self, experiment: str | None = None) -> list[Row]:
        """All rows, or those of one experiment, in a fixed order."""
        query = select(self._table).order_by(*self._table.primary_key.columns)
        if experiment is not None:
            query = query.where(self._table.c[self._keys[0]] == experiment)
        with self._connected("be read") as connection:
            rows = [dict(found._mapping) for found in connection.execute(query)]
        # SQLite keeps NaN as NULL
        return [
            self._kind(**{name: math.nan if value is None else value for name, value in row.items()}) for row in rows
        ]


def _postgresql(text: str) -> Any:
    """The URL with the driver that we use."""
    try:
        head, _, query = text.partition("?")
        if head.count("@") > 1 or "@" in query:
            raise ValueError("the host would begin within the password")
        url = make_url(text)
    except (ArgumentError, ValueError):
        told = re.sub(r"\s", "%20", text)  # no password goes on behind a space
        raise SlrpropError(
            f"--database must be postgresql://user:password@host/name (in the password @ as %40, ? as %3F), got '{told}'"
        ) from None
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise SlrpropError(f"--database must be a path or postgresql://..., got '{url.drivername}://...'")
    need_extra("psycopg", "postgresql")
    return url.set(drivername="postgresql+psycopg")


def _opened_again(place: Path | str, kind: type[Row], keys: tuple[str, ...]) -> Store[Row]:
    """In another process: a file is not begun anew there."""
    return Store(require_seen(place) if isinstance(place, Path) else place, kind, keys)
