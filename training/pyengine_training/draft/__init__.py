"""Draft heads: small networks that guess a frozen model's next tokens from its last hidden state, trained on its own outputs."""
