"""CoalitionFDCR: attackers who plant one backdoor resemble each other more than they resemble the rest.

``views`` says how clients resemble each other, ``state`` remembers it over rounds, ``search`` finds the coalition,
``rule`` puts them together.
"""
