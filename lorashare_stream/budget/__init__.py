"""A limit of bytes or error met by own factors and ranks; the codec replaces this room."""
