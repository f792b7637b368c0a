"""Names of deployments, by which one finds another."""

ENCODER_DEPLOYMENT = "encoder"
