"""``qloralab memory``: what a run will take, before anything is read or bought."""
