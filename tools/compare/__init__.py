"""What ``layerstream bench`` is made of: contenders in processes of their own, and turns that alternate."""
