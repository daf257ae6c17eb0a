from hypothesis import HealthCheck, settings

# A busy machine is no failure: no time limit on an example or on making one.
settings.register_profile("data", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("data")
