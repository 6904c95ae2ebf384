"""All layers, decoders and thresholds from one pass; thresholds with a guarantee."""
