"""Names of Ray Serve applications and deployments."""

GATEWAY_APP = "readapt"
ENCODER_DEPLOYMENT = "encoder"
GATEWAY_DEPLOYMENT = "gateway"
