"""Mixed precision by autocast alone.

Fabric's plugin also casts every floating tensor that enters the model, which would round the coordinates of a
batch to a few digits. Here operations are cast one by one, by autocast, and batches come through as they are.
"""

from typing import Any

from lightning_fabric.plugins import MixedPrecision, Precision

from cfssl.engine.run import HardwareSettings


class Autocast(MixedPrecision):
    """Under 16-mixed, `scaler` scales the loss, and leaves out steps whose gradients overflow."""

    def convert_input(self, data: Any) -> Any:
        return data


def create_precision(hardware: HardwareSettings) -> Precision:
    """Fabric's plugin for `hardware`, on its device."""
    if hardware.precision == "32-true":
        return Precision()
    return Autocast(hardware.precision, hardware.device.type)
