"""The user's model: its layers, their outputs, and its state, which is put back."""
