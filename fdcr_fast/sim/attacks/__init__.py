"""What malicious clients do, in four stages that combine freely, one table of names each.

    data              poison      what the data say, and what counts as success       --attack
    local training    training    how the model is trained on them                    --attacker-training
    update            updates     what is sent of the trained model                   --attacker-update
    Fisher            fishers     which Fisher is sent with it                        --attacker-fisher

``schedule`` says in which rounds. :mod:`fdcr_fast.sim.clients.attackers` runs the stages.
"""
