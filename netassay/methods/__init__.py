"""One folder a family, one module a method. The folder tree is the registry: see `netassay.catalogue`."""
