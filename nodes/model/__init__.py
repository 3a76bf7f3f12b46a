"""The MODEL on the wire as a policy that can be trained."""
