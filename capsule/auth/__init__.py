"""Who asks: API keys and the principal that the rest of the control plane sees."""
