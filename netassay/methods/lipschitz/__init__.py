"""How far outputs can move when inputs do: Lipschitz constants, global and local, and how tight bounds are."""
