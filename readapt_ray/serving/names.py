"""Names of Ray Serve deployments."""

ENCODER_DEPLOYMENT = "encoder"
GATEWAY_DEPLOYMENT = "gateway"
