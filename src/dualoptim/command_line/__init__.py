"""What the command line (`cli`) is made of: options, help, recipes, and a run's command again."""
