"""fusedcomm"""
