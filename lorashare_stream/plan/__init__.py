"""Sources resolved, adapters read and compared, the work and its memory planned."""
