"""What is computed: modules, and the forms that their parameters take."""
