"""Names of deployments, by which one finds another."""

ENCODER_DEPLOYMENT = "encoder"
GATEWAY_DEPLOYMENT = "gateway"
