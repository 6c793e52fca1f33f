package dev.lobit.demo

import android.app.ActivityManager
import android.content.Context
import android.content.Intent
import android.content.IntentFilter
import android.os.BatteryManager
import android.os.Build
import android.os.PowerManager
import dev.lobit.core.Probe
import java.io.File
import java.io.IOException
import org.json.JSONArray
import org.json.JSONObject

/** Reads what Android tells without a permission. */
class PhoneProbe(private val context: Context) : Probe {
    /** Bytes of memory that are free for apps. */
    val freeMemory: Long get() = memory().availMem

    private fun memory() = ActivityManager.MemoryInfo().also {
        (context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(it)
    }

    override fun device(): JSONObject = JSONObject()
        .put("manufacturer", Build.MANUFACTURER).put("model", Build.MODEL)
        .put("android", Build.VERSION.RELEASE).put("sdk", Build.VERSION.SDK_INT)
        .put("soc", if (Build.VERSION.SDK_INT >= 31) "${Build.SOC_MANUFACTURER} ${Build.SOC_MODEL}" else Build.HARDWARE)
        .put("cores", java.lang.Runtime.getRuntime().availableProcessors()).put("memory_bytes", memory().totalMem)
        .put("abi", Build.SUPPORTED_ABIS.firstOrNull() ?: "")

    override fun state(): JSONObject {
        val battery = battery()
        val level = battery?.getIntExtra(BatteryManager.EXTRA_LEVEL, -1) ?: -1
        val scale = battery?.getIntExtra(BatteryManager.EXTRA_SCALE, 100) ?: 100
        val power = context.getSystemService(Context.POWER_SERVICE) as PowerManager
        val thermal: Any = if (Build.VERSION.SDK_INT >= 29) power.currentThermalStatus else JSONObject.NULL
        return JSONObject()
            .put("battery_celsius", celsius() ?: JSONObject.NULL)
            .put("battery_percent", if (level >= 0 && scale > 0) level * 100 / scale else JSONObject.NULL)
            .put("thermal_status", thermal).put("frequencies_khz", frequencies())
    }

    private fun battery(): Intent? = context.registerReceiver(null, IntentFilter(Intent.ACTION_BATTERY_CHANGED))

    override fun celsius(): Double? =
        battery()?.getIntExtra(BatteryManager.EXTRA_TEMPERATURE, Int.MIN_VALUE)?.takeIf { it != Int.MIN_VALUE }?.let { it / 10.0 }

    /** Clock of each processor core in kHz, null for those that the system does not show. */
    private fun frequencies(): JSONArray {
        val found = JSONArray()
        for (core in 0 until java.lang.Runtime.getRuntime().availableProcessors()) {
            val text = read(File("/sys/devices/system/cpu/cpu$core/cpufreq/scaling_cur_freq"))
            found.put(text?.trim()?.toLongOrNull() ?: JSONObject.NULL)
        }
        return found
    }

    override fun peakMemory(): Long {
        val line = read(File("/proc/self/status"))?.lineSequence()?.firstOrNull { it.startsWith("VmHWM") } ?: return 0
        return (line.filter(Char::isDigit).toLongOrNull() ?: 0) * 1024
    }

    private fun read(file: File): String? = try { file.readText() } catch (_: IOException) { null }
}
