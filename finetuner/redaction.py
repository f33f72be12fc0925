"""What must not be shown or saved: keys that hold a secret, and credentials inside an address."""

import re
from typing import Any

# They have no place in a recipe, which is copied, committed and written beside the result.
SECRET_KEYS = (
    "hub_token", "hf_token", "wandb_api_key", "comet_api_key", "swanlab_api_key", "swanlab_lark_secret",
    "mlflow_tracking_password", "mlflow_tracking_token", "trackio_token", "aws_secret_access_key",
)  # fmt: skip
HIDDEN = "***"

_LINE = re.compile(rf"((?:^|[\s{{,\"'])(?:{'|'.join(SECRET_KEYS)})[\"']?\s*[:=]\s*)[^\s,}}][^,}}]*", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SIGNATURE = re.compile(r"([?&](?:token|sig|signature|key|x-amz-[a-z-]+)=)[^&\s]+", re.IGNORECASE)


def hidden(text: str) -> str:
    """`text` with the values of secret keys, and credentials in addresses, replaced."""
    text = _LINE.sub(rf"\1{HIDDEN}", text)
    return _SIGNATURE.sub(rf"\1{HIDDEN}", _CREDENTIALS.sub(HIDDEN, text))


def without_secrets(value: Any) -> Any:
    """The same value, with credentials in addresses replaced wherever they stand."""
    if isinstance(value, str):
        return _SIGNATURE.sub(rf"\1{HIDDEN}", _CREDENTIALS.sub(HIDDEN, value)) if "://" in value else value
    if isinstance(value, dict):
        return {key: without_secrets(inner) for key, inner in value.items()}
    return [without_secrets(inner) for inner in value] if isinstance(value, list) else value
