"""Networks: find layers, stream their inputs, run what follows a layer, swap weights."""

from typing import TYPE_CHECKING

from slrprop.lazy import lazily

if TYPE_CHECKING:
    from slrprop.network.opening import *  # noqa: F403

lazily(__name__, {"opening": "Lockstep Network OnnxNetwork TorchNetwork folded in_lockstep open_network"})
