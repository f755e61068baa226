"""The named recipes: YAML files beside this one, in the form that users write."""
