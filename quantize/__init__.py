"""How numbers are stored and computed: recipes as data."""
