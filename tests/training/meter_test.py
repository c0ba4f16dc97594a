import time

from msba_jax.training.meter import Meter


def test_speed_and_waiting_leave_pauses_out():
  meter = Meter()
  assert meter.cold
  assert meter.take(images=4) == {}
  meter.start()
  with meter.waiting():
    time.sleep(0.03)
  with meter.paused():
    time.sleep(0.3)
  time.sleep(0.03)
  meter.count()
  meter.count()
  taken = meter.take(images=4)
  assert 8 / 0.25 < taken['images_per_second'] <= 8 / 0.06
  assert 0.1 < taken['data_wait'] < 0.9
  assert meter.take(images=4) == {}
