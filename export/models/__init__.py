"""Model families: attention, caches, routers and decoder layers as an export needs them."""
