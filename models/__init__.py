"""Everything that holds weights, or talks to something that does. No Beam here."""
