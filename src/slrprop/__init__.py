"""slrprop: smaller and faster neural networks by rewriting their dense weights."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is loaded, so before all imports

from slrprop import relevance
from slrprop.api import apply, inspect, plan
from slrprop.errors import SlrpropError
from slrprop.export import export_onnx
from slrprop.measure import measure
from slrprop.network.onnx.parity import Parity
from slrprop.plan import Plan
from slrprop.search import BudgetError, compress
from slrprop.storage import load, save
from slrprop.tune import TuneSettings, tune

__all__ = [
    "BudgetError",
    "Parity",
    "Plan",
    "SlrpropError",
    "TuneSettings",
    "apply",
    "compress",
    "export_onnx",
    "inspect",
    "load",
    "measure",
    "plan",
    "relevance",
    "save",
    "tune",
]
__version__ = "0.1.0"
