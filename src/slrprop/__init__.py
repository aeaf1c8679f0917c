"""slrprop: smaller and faster neural networks by rewriting their dense weights."""

import os
from typing import TYPE_CHECKING

from slrprop.lazy import lazily

if TYPE_CHECKING:
    from slrprop import relevance as relevance
    from slrprop.api import apply as apply
    from slrprop.api import plan as plan
    from slrprop.errors import SlrpropError as SlrpropError
    from slrprop.export import export_onnx as export_onnx
    from slrprop.inspection import inspect as inspect
    from slrprop.measure import measure as measure
    from slrprop.network.onnx.parity import Parity as Parity
    from slrprop.plan import Plan as Plan
    from slrprop.search.compress import compress as compress
    from slrprop.search.result import BudgetError as BudgetError
    from slrprop.storage import load as load
    from slrprop.storage import save as save
    from slrprop.tune import TuneSettings as TuneSettings
    from slrprop.tune import tune as tune

__all__ = ["relevance"]  # and what is loaded lazily
__version__ = "0.1.0"

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is loaded, so before all imports
lazily(__name__, {
    "api": "apply plan", "errors": "SlrpropError", "export": "export_onnx", "inspection": "inspect", "measure": "measure", "network.onnx.parity": "Parity",
    "plan": "Plan", "search.compress": "compress", "search.result": "BudgetError", "storage": "load save", "tune": "TuneSettings tune",
})  # fmt: skip
