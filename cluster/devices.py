"""What a device can do at most, to measure a step by."""

import torch

# Dense bf16 products with float32 sums, TFLOP/s, from the makers' data sheets. The first name that the device's own contains counts.
_PEAK_BF16_TFLOPS = {
    "GB200": 2500,
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
}


def peak_flops_per_s(device: torch.device, precision: str) -> float | None:
    """Of one device at bf16; None where it is not known, or the precision is another."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in _PEAK_BF16_TFLOPS.items() if known in name), None)
