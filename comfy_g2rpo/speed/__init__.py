"""What makes completions cheaper or lets them fit."""
