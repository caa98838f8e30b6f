"""A transform code of one adapter's dW, with one quantiser step for all its coefficients."""
